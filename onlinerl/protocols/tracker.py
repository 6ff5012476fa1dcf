"""The role of trackers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from onlinerl.types import Metric


class Tracker(Protocol):
    """Is told what happens. Trackers never influence the run; what one does not care about it leaves as it is."""

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Work of `total` `unit`s begins; None if the amount is not known."""
        return

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """`amount` more is done."""
        return

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """The phase is over and on disk."""
        return

    def log(self, metrics: Iterable[Metric]) -> None:
        """Figures."""
        return

    def note(self, text: str) -> None:
        """A sentence for people."""
        return

    def ended(self, state: str) -> None:
        """The run has ended: `finished`, `failed` or `interrupted`. Nothing but `close` follows."""
        return

    def close(self) -> None:
        """Nothing more will come."""
        return
