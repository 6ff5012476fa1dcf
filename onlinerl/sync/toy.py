"""A toy weight sync for fast contract tests of the loop: a copy within one process, proved like the real ones."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from onlinerl.errors import SyncError
from onlinerl.types import SyncReport

__all__ = ["ToySync"]


class ToySync:
    """Copies an array from `read` to `write`, and compares what `held` then says.

    Args:
        read: the learner's weights.
        write: gives weights and version to the engine.
        held: the engine's weights.
    """

    def __init__(
        self, read: Callable[[], np.ndarray], write: Callable[[np.ndarray, int], None], held: Callable[[], np.ndarray]
    ) -> None:
        self._read, self._write, self._held = read, write, held

    def push(self, version: int) -> SyncReport:
        """Copy and compare.

        Raises:
            SyncError: if the engine does not hold what the learner holds.
        """
        started = time.monotonic()
        weights = self._read()
        self._write(weights, version)
        if not np.array_equal(self._held(), weights):
            raise SyncError("the engine does not hold the learner's weights", field="sync", fix="this is a bug of the toy")
        seconds = time.monotonic() - started
        return SyncReport(
            version=version,
            seconds=seconds,
            bytes=weights.nbytes,
            replicas=1,
            backend="toy",
            phases={"push": seconds},
            proved=True,
            tensors_checked=1,
            canary_nats=0.0,
        )
