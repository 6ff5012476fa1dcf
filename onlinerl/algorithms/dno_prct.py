"""DNO as practised: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", Algorithm 2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlinerl.algorithms.dpo import Dpo
from onlinerl.types.training import TrainItem, TrainSequence

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class DnoPrct(Dpo):
    """DPO against the policy of the iteration's start, on pairs whose winner is good and clearly better than the loser."""

    reference = "previous"

    floor: float | None = None
    """Lowest score of a winner; None accepts any. In units of the oracle's score (win rates, if it gives none)."""
    margin: float | None = None
    """Smallest score gap between winner and loser; None accepts any."""

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs that pass both filters, without those of identical or unjudged responses."""
        built, dropped = super().items(judged, pairs)
        reasons = [self.rejects(*item.sequences[:2]) for item in built]
        dropped.update(reason for reason in reasons if reason is not None)
        return [item for item, reason in zip(built, reasons, strict=True) if reason is None], dropped

    def rejects(self, winner: TrainSequence, loser: TrainSequence) -> str | None:
        """Why a pair does not pass: `gap` (below the margin), `floor` (the winner is too bad); None if it passes."""
        if self.margin is not None and winner.score - loser.score < self.margin:
            return "gap"
        if self.floor is not None and winner.score < self.floor:
            return "floor"
        return None
