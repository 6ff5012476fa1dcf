"""Several trackers as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onlinerl.protocols import Tracker
from onlinerl.types import Metric


class FanoutTracker(Tracker):
    """Tells each of its trackers everything, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.phase_started(iteration, phase, total, unit)

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.phase_advanced(iteration, phase, amount)

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.phase_finished(iteration, phase, seconds)

    def log(self, metrics: Iterable[Metric]) -> None:
        """Pass on."""
        once = list(metrics)  # a generator would be empty for the second tracker
        for tracker in self._trackers:
            tracker.log(once)

    def note(self, text: str) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.note(text)

    def close(self) -> None:
        """Pass on."""
        for tracker in self._trackers:
            tracker.close()
