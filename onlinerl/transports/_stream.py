"""What the transports have in common that send tensor after tensor, through vLLM's weight-transfer API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from onlinerl.errors import ConfigError
from onlinerl.protocols.learner import TensorMeta, WeightSource
from onlinerl.protocols.transport import Layout, Meeting, Replicas, Sender, TransportConfig

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo


class Stream(TransportConfig):
    """Both halves are engines of that API: ours, or vLLM's own."""

    bucket_mib: int = Field(64, ge=1)
    """Size of one message, which is the extra memory that a transfer takes on either side: one message at a time over gloo, two in
    flight over nccl, one buffer per GPU for ipc. A larger tensor travels alone."""

    @property
    def bucket_bytes(self) -> int:
        """The same in bytes."""
        return self.bucket_mib * 2**20

    def init_info(self, meeting: Meeting, metas: Sequence[TensorMeta]) -> TrainerInitInfo:
        """What vLLM asks for to open the sending half of rank `meeting.rank`, which will send `metas`."""
        raise NotImplementedError

    def sender(self, meeting: Meeting, replicas: Replicas, source: WeightSource) -> Sender:
        """Open the sending half; returns once all replicas have joined."""
        from onlinerl.transports._vllm import VllmSender

        return VllmSender(self.init_info(meeting, source.metadata()), replicas, source)


def require_gpus(layout: Layout) -> None:
    """Refuse a run that is known to be on CPUs.

    Raises:
        ConfigError: naming the field.
    """
    if layout.device == "cpu":
        raise ConfigError("needs GPUs, and the run is on CPUs", field="sync.backend", fix="leave it out on CPUs")
