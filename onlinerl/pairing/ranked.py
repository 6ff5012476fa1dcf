"""The upper half of the ranking against the lower half, rank by rank: K/2 pairs with comparable gaps.

Source: E5; Online Self-Preferring Language Models.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair


class Ranked(PairBuilder):
    """Ranks the distinct responses and pairs rank r with rank r + half. Each is used once; an odd number leaves the median out."""

    min_gap: float = Field(0.0, ge=0)
    """The gap of a pair must exceed this; in win rate (0 to 1), or in the oracle's score."""

    def most(self, samples: int) -> int:
        """Every response is in at most one pair."""
        return samples // 2

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Up to D // 2 pairs for D distinct responses, and how many were dropped for which reason (see BestWorst)."""
        candidates = _candidates.by_preference(judged)
        if reason := candidates.none():
            return [], reason
        order, half = candidates.order, len(candidates.order) // 2
        return _candidates.select(candidates, list(zip(order[:half], order[-half:], strict=True)), self.min_gap, ties=self.ties)
