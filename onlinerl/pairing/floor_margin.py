"""Every pair whose winner is good enough and whose loser is clearly worse, by score.

Source: E2; Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair


class FloorMargin(PairBuilder):
    """Keeps (w, l) if score(w) >= floor and score(w) - score(l) >= margin. Both depend on the units of the oracle's scores,
    so there is no default: the source has 5 and 2 for a judge with six points."""

    floor: float
    """Lowest score of a winner."""
    margin: float = Field(gt=0)
    """Smallest difference between winner and loser."""

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many of the K(K-1)/2 were dropped: `identical`, `tie`, `gap` (below margin), `floor` (winner too bad).

        Raises:
            OracleError: if the oracle returns no scores.
        """
        candidates = _candidates.by_score(judged)
        pairs, dropped = _candidates.select(candidates, list(combinations(candidates.order, 2)))
        dropped += candidates.lost()
        kept: list[Pair] = []
        for pair in pairs:
            if pair.gap < self.margin:
                dropped["gap"] += 1
            elif candidates.quality[pair.chosen] < self.floor:
                dropped["floor"] += 1
            else:
                kept.append(pair)
        return kept, dropped
