"""Every pair of responses with a clear enough winner: up to K(K-1)/2 pairs per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair


class AllPairs(PairBuilder):
    """Pairs each response with every worse one, by win rate (or by score, if the oracle only scores)."""

    min_gap: float = Field(0.0, ge=0)
    """The gap of a pair must exceed this; in win rate (0 to 1), or in the oracle's score."""
    max_pairs: int | None = Field(None, ge=1)
    """Keep only this many pairs per prompt, those with the largest gap; all by default."""

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs with the largest gap first, and how many of the K(K-1)/2 were dropped for which reason."""
        candidates = _candidates.by_preference(judged)
        pairs, dropped = _candidates.select(candidates, list(combinations(candidates.order, 2)), self.min_gap, ties=self.ties)
        dropped += candidates.lost()
        pairs.sort(key=lambda pair: -pair.gap)  # stable: equal gaps keep the order of the ranking
        if self.max_pairs is not None and len(pairs) > self.max_pairs:
            dropped["max_pairs"] = len(pairs) - self.max_pairs
            pairs = pairs[: self.max_pairs]
        return pairs, dropped
