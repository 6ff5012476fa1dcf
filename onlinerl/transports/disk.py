"""Weights from files: replicas load the export that the checkpoint of each iteration writes anyway.

It needs no connection between learner and engine, and works for every engine that can load a model from a path; the run directory and the
model must be on a disk that all nodes share. Version 0 is the base model.
"""

from __future__ import annotations

from typing import ClassVar

from onlinerl.errors import ConfigError
from onlinerl.protocols.learner import WeightSource
from onlinerl.protocols.transport import Layout, Meeting, Replicas, TransportConfig


class Disk(TransportConfig):
    """The transport that everything can receive."""

    backend: str = "disk"

    precedence: ClassVar[int | None] = 4

    def check(self, layout: Layout) -> None:
        """Refuse a detour."""
        super().check(layout)
        if layout.colocated:
            raise ConfigError(
                "takes the weights through files, though learner and replica share a GPU",
                field="sync.backend",
                fix="leave it out (ipc is chosen on shared GPUs), or set cluster.colocate=false",
            )

    def sender(self, meeting: Meeting, replicas: Replicas, source: WeightSource) -> DiskSender:
        """There is nobody to meet."""
        return DiskSender(meeting, replicas)


class DiskSender:
    """Tells the replicas where the weights are.

    Args:
        meeting: says who is rank 0.
        replicas: used by rank 0.
    """

    def __init__(self, meeting: Meeting, replicas: Replicas) -> None:
        self._meeting, self._replicas = meeting, replicas

    def send(self, version: int, path: str | None) -> None:
        """Return once all replicas have loaded them, rounded as they would be on the wire."""
        assert path is not None, "a transport without a receiver is told where the files are"
        if self._meeting.rank == 0:
            self._replicas.load_weights(path, version, self._meeting.dtypes)
