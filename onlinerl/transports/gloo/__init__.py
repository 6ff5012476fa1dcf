"""Weights over gloo, between processes of one or several machines, through host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from onlinerl.errors import ConfigError
from onlinerl.protocols.learner import TensorMeta
from onlinerl.protocols.transport import Layout, Meeting
from onlinerl.transports._stream import Stream

if TYPE_CHECKING:
    from onlinerl.transports.gloo.halves import GlooTrainerInitInfo


class Gloo(Stream):
    """The transport on CPUs; both halves are ours."""

    backend: str = "gloo"

    receiver: ClassVar[str | None] = "gloo"
    precedence: ClassVar[int | None] = 3

    def check(self, layout: Layout) -> None:
        """Refuse a detour."""
        super().check(layout)
        if layout.colocated:
            raise ConfigError(
                "takes the weights through host memory, though learner and replica share a GPU",
                field="sync.backend",
                fix="leave it out (ipc is chosen on shared GPUs), or set cluster.colocate=false",
            )

    def init_info(self, meeting: Meeting, metas: Sequence[TensorMeta]) -> GlooTrainerInitInfo:
        """Who meets where; rank 0 opens a port of its own."""
        from onlinerl.transports.gloo.halves import GlooTrainerInitInfo

        return GlooTrainerInitInfo(
            rank=meeting.rank,
            master_address=meeting.address,
            world_size=1 + meeting.workers,
            bucket_bytes=self.bucket_bytes,
            timeout_s=self.timeout_s,
        )
