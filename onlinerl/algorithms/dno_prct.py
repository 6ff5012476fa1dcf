"""DNO as practised: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", Algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from onlinerl.algorithms.dpo import Dpo
from onlinerl.types import Judged, Pair, TrainItem, TrainSequence


class DnoPrct(Dpo):
    """DPO against the policy of the iteration's start, on pairs whose winner is good and clearly better than the loser."""

    floor: float | None = None
    """Lowest score of a winner; None accepts any. In units of the oracle's score (win rates, if it gives none)."""
    margin: float | None = None
    """Smallest score gap between winner and loser; None accepts any."""

    @property
    def default_reference(self) -> Literal["fixed", "previous", "none"]:
        """The policy at the iteration's start."""
        return "previous"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> list[TrainItem]:
        """The pairs that pass both filters, without those of identical responses."""
        return [item for item in super().items(judged, pairs) if self.accepts(*item.sequences)]

    def accepts(self, winner: TrainSequence, loser: TrainSequence) -> bool:
        """Whether a pair passes both filters."""
        good = self.floor is None or winner.score >= self.floor
        clear = self.margin is None or winner.score - loser.score >= self.margin
        return good and clear
