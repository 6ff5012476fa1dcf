"""What is said about the replicas of the engine: on the console, and as figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.tracker import Tracker

Reason = Literal["died", "hung", "garbage", "push", "start"]
"""Why a replica was given up: its process ended; it did not answer in time; what it answered cannot be true; it failed in a push; it
failed while it was started again."""


class FleetReporter:
    """Notes and metrics about replicas.

    Args:
        tracker: who is told.
        attempt: how often the run was resumed.
    """

    def __init__(self, tracker: Tracker, attempt: int = 0) -> None:
        self._tracker, self._attempt = tracker, attempt
        self._counts: dict[str, int] = {}

    def note(self, text: str) -> None:
        """A sentence."""
        self._tracker.note(text)

    def lost(self, version: int, number: int, name: str, reason: Reason, cause: str) -> None:
        """A replica was given up, the `number`-th of this attempt, while the fleet served `version`."""
        self._tracker.note(f"{name} is given up ({reason}): {cause}")
        self._count("replica_deaths", version, number, name, reason)

    def restarted(self, version: int, number: int, most: int, name: str, reason: Reason) -> None:
        """It is being started again, the `number`-th restart of at most `most`."""
        self._tracker.note(f"{name} is started again, restart {number} of at most {most} (engine.max_restarts)")
        self._count("replica_restarts", version, number, name, reason)

    def states(self, version: int, counts: Mapping[str, int], least: int) -> None:
        """How many replicas are in each state, and how many must be."""
        now = {state: counts.get(state, 0) for state in {**self._counts, **counts}}
        if now == self._counts:
            return
        self._counts = now
        self._tracker.log(
            [
                *(
                    CATALOGUE.record("replicas", float(n), iteration=version, attempt=self._attempt, labels={"state": state})
                    for state, n in now.items()
                ),
                CATALOGUE.record("replicas_least", float(least), iteration=version, attempt=self._attempt),
            ]
        )

    def _count(self, metric: str, version: int, number: int, name: str, reason: Reason) -> None:
        # A metric of a name and labels supersedes its older value: each death is one of its own.
        labels = {"replica": name, "reason": reason, "number": str(number), "attempt": str(self._attempt)}
        self._tracker.log([CATALOGUE.record(metric, 1.0, iteration=version, attempt=self._attempt, labels=labels)])
