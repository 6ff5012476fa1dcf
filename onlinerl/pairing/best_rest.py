"""The best response against each of the others: up to K - 1 pairs per prompt.

Source: "Curry-DPO: Enhancing Alignment using Curriculum Learning & Ranked Preferences".
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair


class BestRest(PairBuilder):
    """Pairs the response with the highest win rate (or score, if the oracle only scores) with every worse one."""

    min_gap: float = Field(0.0, ge=0)
    """The gap of a pair must exceed this; in win rate (0 to 1), or in the oracle's score."""

    def most(self, samples: int) -> int:
        """All but the best."""
        return samples - 1

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs with the largest gap first, and how many were dropped for which reason (see BestWorst)."""
        candidates = _candidates.by_preference(judged)
        if reason := candidates.none():
            return [], reason
        best, *others = candidates.order
        return _candidates.select(candidates, [(best, other) for other in reversed(others)], self.min_gap, ties=self.ties)
