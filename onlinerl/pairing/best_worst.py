"""The best response against the worst one: at most one pair per prompt.

Source: E1; Self-Play Preference Optimization for Language Model Alignment; RLHF Workflow: From Reward Modeling to Online RLHF.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair


class BestWorst(PairBuilder):
    """Pairs the response with the highest win rate (or score, if the oracle only scores) with the one with the lowest."""

    min_gap: float = Field(0.0, ge=0)
    """The gap between the two must exceed this; in win rate (0 to 1), or in the oracle's score."""

    def most(self, samples: int) -> int:
        """One pair."""
        return 1

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """One pair or none; counts of the reasons for none: `single` (K is 1), `identical`, `tie`, `gap`, `unknown`."""
        candidates = _candidates.by_preference(judged)
        if reason := candidates.none():
            return [], reason
        return _candidates.select(candidates, [(candidates.order[0], candidates.order[-1])], self.min_gap)
