"""Weights through CUDA IPC handles, where learner and replica share a GPU: vLLM's own transport on both sides.

Every rank packs its weights into a buffer on its own GPU. The ranks gather their handles in a mapping from GPU to handle, rank 0 sends
the mapping to every replica, and each replica opens the one of the GPU it lives on. So every rank takes part in every message, and a
replica without a rank on its GPU fails with an error that lists the GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from onlinerl.errors import ConfigError
from onlinerl.protocols.learner import TensorMeta
from onlinerl.protocols.transport import Layout, Meeting
from onlinerl.transports._sizes import nbytes
from onlinerl.transports._stream import Stream, require_gpus

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo


class Ipc(Stream):
    """The transport inside a GPU."""

    backend: str = "ipc"

    receiver: ClassVar[str | None] = "ipc"
    precedence: ClassVar[int | None] = 1

    def check(self, layout: Layout) -> None:
        """One GPU is needed, with both on it."""
        super().check(layout)
        require_gpus(layout)
        if not layout.colocated:
            raise ConfigError(
                "hands over memory inside one GPU, and learner and engine have GPUs of their own",
                field="sync.backend",
                fix="leave it out (nccl is chosen between GPUs), or set cluster.colocate=true",
            )

    def environment(self) -> Mapping[str, str]:
        """Handles reach the engine's own child process as pickles, over a socket of its machine; vLLM asks for consent."""
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    def init_info(self, meeting: Meeting, metas: Sequence[TensorMeta]) -> IPCTrainerInitInfo:
        """Handles need no rendezvous. The buffer holds the largest tensor: vLLM refuses to cut one up."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        size = max([self.bucket_bytes, *map(nbytes, metas)])
        return IPCTrainerInitInfo(rank=meeting.rank, packed=True, packed_buffer_size_bytes=size)
