"""One of the upper half of the ranking against one of the lower half, both drawn.

Source: E3; "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization".
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair, derive_seed


class Halves(PairBuilder):
    """Draws the winner from the upper half of the distinct responses and the loser from the lower half; an odd number leaves the median out.

    Chance comes from the seeds of the responses, so from the run's seed, iteration and prompt, and not from the order in the group.
    """

    draws: int = Field(1, ge=1)
    """Pairs drawn from each group; no pair twice."""
    min_gap: float = Field(0.0, ge=0)
    """The gap of a pair must exceed this; in win rate (0 to 1), or in the oracle's score."""

    def most(self, samples: int) -> int:
        """No pair twice."""
        return min(self.draws, (samples // 2) ** 2)

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many were dropped for which reason (see BestWorst)."""
        candidates = _candidates.by_preference(judged)
        if reason := candidates.none():
            return [], reason
        rollouts, prompt = judged.group.rollouts, judged.group.prompt.id
        order, half = candidates.order, len(candidates.order) // 2
        possible = [(better, worse) for better in order[:half] for worse in order[-half:]]

        def chance(two: tuple[int, int]) -> tuple[int, str, str]:
            (a, b) = (rollouts[i] for i in two)
            return derive_seed("halves", prompt, a.seed, a.text, b.seed, b.text), a.text, b.text

        return _candidates.select(candidates, sorted(possible, key=chance)[: self.draws], self.min_gap, ties=self.ties)
