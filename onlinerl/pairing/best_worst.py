"""The best response against the worst one, or another: at most one pair per prompt.

Source: E1; Self-Play Preference Optimization for Language Model Alignment; RLHF Workflow: From Reward Modeling to Online RLHF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair, derive_seed


class BestWorst(PairBuilder):
    """Pairs the response with the highest win rate (or score, if the oracle only scores) with the one with the lowest."""

    against: Literal["worst", "second", "random"] = "worst"
    """What the best one is paired with: the worst, the second best, which is a harder pair, or any other, by a chance that comes from the seeds of the
    responses, so from the run's seed, iteration and prompt."""
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
        best, *others = candidates.order
        return _candidates.select(candidates, [(best, self._other(judged, others))], self.min_gap, ties=self.ties)

    def _other(self, judged: Judged, others: Sequence[int]) -> int:
        """Of those that are not the best, in the order of the ranking."""
        if self.against != "random":
            return others[0 if self.against == "second" else -1]
        rollouts, prompt = judged.group.rollouts, judged.group.prompt.id
        return min(others, key=lambda i: (derive_seed("against", prompt, rollouts[i].seed, rollouts[i].text), rollouts[i].text))
