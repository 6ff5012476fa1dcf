"""Several trackers as one."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.tracker import Tracker
from onlinerl.types import Metric

_VIEW_FAILED = (OSError, ValueError, TypeError, LookupError, RuntimeError)
"""What a view may raise without ending the run: no terminal, a full disk, a value that it cannot show."""


class FanoutTracker(Tracker):
    """Tells each of its trackers everything, in order. Phases that run side by side tell it one at a time.

    A tracker that fails does not end the run, which may have cost days. The first failure of each is said to the others and on
    stderr; how many there were is the metric `tracker_failures`. An OnlineRLError passes: with it a tracker says that the run must
    not go on, as where metrics.jsonl cannot be written.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._one_at_a_time = threading.RLock()
        self._closed = False
        self._failures: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Pass on."""
        self._tell(lambda tracker: tracker.phase_started(iteration, phase, total, unit))

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """Pass on."""
        self._tell(lambda tracker: tracker.phase_advanced(iteration, phase, amount))

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Pass on."""
        self._tell(lambda tracker: tracker.phase_finished(iteration, phase, seconds))

    def log(self, metrics: Iterable[Metric]) -> None:
        """Pass on, with what failed since the last time."""
        with self._one_at_a_time:
            once = list(metrics)  # a generator would be empty for the second tracker
            if once:
                once += self._news(once[-1])
            self._tell(lambda tracker: tracker.log(once))

    def note(self, text: str) -> None:
        """Pass on."""
        self._tell(lambda tracker: tracker.note(text))

    def ended(self, state: str) -> None:
        """Pass on."""
        self._tell(lambda tracker: tracker.ended(state))

    def close(self) -> None:
        """Pass on; whatever a phase that is being stopped still says is not heard."""
        with self._one_at_a_time:
            self._tell(lambda tracker: tracker.close())
            self._closed = True

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        with self._one_at_a_time:
            for tracker in () if self._closed else self._trackers:
                try:
                    tell(tracker)
                except _VIEW_FAILED as error:
                    self._failed(type(tracker).__name__, error)

    def _failed(self, name: str, error: Exception) -> None:
        self._failures[name] += 1
        if self._failures[name] == 1:
            said = f"{name} failed and may miss figures from here on; the run goes on: {type(error).__name__}: {error}"
            logging.getLogger(__name__).warning(said)
            self.note(said)

    def _news(self, latest: Metric) -> list[Metric]:
        """How often each tracker has failed so far, where that is more than was logged."""
        changed = {name: count for name, count in self._failures.items() if count > self._logged[name]}
        self._logged.update(self._failures - self._logged)
        return [
            CATALOGUE.record(
                "tracker_failures",
                float(count),
                labels={"tracker": name},
                iteration=latest.iteration,
                attempt=latest.attempt,
            )
            for name, count in changed.items()
        ]
