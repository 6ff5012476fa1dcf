"""The role of trackers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onlinerl.metrics.collection import Catalogue
from onlinerl.protocols.component import Component
from onlinerl.types import Metric

if TYPE_CHECKING:
    from rich.console import Console


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


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The run that a tracker is told about."""

    name: str
    directory: Path
    catalogue: Catalogue
    """Every metric that it may report, those of its algorithm among them."""
    earlier: Sequence[Mapping[str, Any]]
    """What earlier attempts have reported: the records of metrics.jsonl."""
    console: Console


class TrackerConfig(Component):
    """A tracker as it is configured: its fields are its knobs."""

    name: str = ""

    def check(self) -> None:
        """Refuse what would only be noticed when the run directory is there already.

        Raises:
            ConfigError: naming the field.
        """

    def open(self, run: Tracked) -> Tracker:
        """A tracker of this run."""
        raise NotImplementedError
