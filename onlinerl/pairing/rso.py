"""Responses drawn from the optimal policy that their scores imply, by rejection; then paired.

Source: "Statistical Rejection Sampling Improves Preference Optimization", Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from onlinerl.pairing import _candidates
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Judged, Pair, derive_seed


class Rso(PairBuilder):
    """Accepts some of the distinct responses, about in proportion to exp(r / beta), and pairs the first accepted with the second, the third
    with the fourth, and so on. r is the oracle's score; of one that only compares, the logit of the win rate.

    Chance comes from the seeds of the responses, so from the run's seed, iteration and prompt, and not from the order in the group.
    """

    accept: int = Field(8, ge=2)
    """How many responses are accepted. The paper takes 8 of 64 (`sampling.samples_per_prompt`)."""
    beta: float = Field(0.5, gt=0)
    """In units of r: small accepts the best responses, large accepts any. It is not the beta of the loss."""

    def most(self, samples: int) -> int:
        """Every accepted response is in at most one pair."""
        return min(self.accept, samples) // 2

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many were dropped for which reason (see BestWorst)."""
        scored = judged.verdict.scores is not None
        candidates = _candidates.by_score(judged) if scored else _candidates.by_preference(judged)
        if reason := candidates.none():
            return [], reason
        rewards = candidates.quality if scored else np.log(candidates.quality) - np.log1p(-candidates.quality)
        accepted = self.accepted(judged, candidates.order, rewards)
        rank = {index: place for place, index in enumerate(candidates.order)}
        couples = [sorted(two, key=rank.__getitem__) for two in zip(accepted[::2], accepted[1::2], strict=False)]
        return _candidates.select(candidates, [(better, worse) for better, worse in couples], ties=self.ties)

    def accepted(self, judged: Judged, order: Sequence[int], rewards: Sequence[float] | np.ndarray) -> list[int]:
        """Which of the responses `order` are accepted, in the order in which they are.

        They are walked in the order of their seeds, again and again, and one is accepted if u < exp((r - r_max) / beta), u uniform on [0, 1)
        and r_max the best reward that remained before the walk. So the best remaining one always is.
        """
        rollouts, prompt = judged.group.rollouts, judged.group.prompt.id
        remaining = sorted(order, key=lambda i: (rollouts[i].seed, rollouts[i].text))
        accepted: list[int] = []
        walk = 0
        while remaining and len(accepted) < self.accept:
            best = max(rewards[i] for i in remaining)
            for i in tuple(remaining):
                u = derive_seed("rejection", prompt, rollouts[i].seed, rollouts[i].text, walk) / 2**31
                if len(accepted) < self.accept and u < math.exp((rewards[i] - best) / self.beta):
                    accepted.append(i)
                    remaining.remove(i)
            walk += 1
        return accepted
