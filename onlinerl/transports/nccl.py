"""Weights over NCCL, between GPUs of different processes: vLLM's own transport on both sides.

Rank 0 of the learner is rank 0 of the group and sends; the other ranks only take part in gathering. Each vLLM worker is a member:
those of a replica follow those of the replica before it (`rank_offset`, plus the worker's own rank under tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from onlinerl.errors import ConfigError
from onlinerl.network import free_port
from onlinerl.protocols.learner import TensorMeta
from onlinerl.protocols.transport import Layout, Meeting
from onlinerl.transports._stream import Stream, require_gpus

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo


class Nccl(Stream):
    """The transport between GPUs."""

    backend: str = "nccl"

    receiver: ClassVar[str | None] = "nccl"
    precedence: ClassVar[int | None] = 2

    def check(self, layout: Layout) -> None:
        """Two GPUs are needed."""
        super().check(layout)
        require_gpus(layout)
        if layout.colocated:
            raise ConfigError(
                "nccl does not go between two processes on one GPU",
                field="sync.backend",
                fix="leave it out (ipc is chosen on shared GPUs), or set cluster.colocate=false",
            )

    def init_info(self, meeting: Meeting, metas: Sequence[TensorMeta]) -> NCCLTrainerInitInfo:
        """What one rank needs to open the group. Two messages are in flight."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            rank=meeting.rank,
            master_address=meeting.address,
            # Of the sender's machine. The other ranks do not join, and read it from nobody.
            master_port=free_port(meeting.address) if meeting.rank == 0 else 0,
            world_size=1 + meeting.workers,
            packed_buffer_size_bytes=self.bucket_bytes,
        )
