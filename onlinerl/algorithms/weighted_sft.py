"""Supervised learning weighted by reward: the class weights of C-RLFT, "OpenChat: Advancing Open-source Language Models with Mixed-Quality
Data", or exp(score / beta), "Reinforcement Learning by Reward-weighted Regression for Operational Space Control"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms._imitation import Imitation
from onlinerl.ops.items import judged_sequences, sample_items

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


LEAST = 1e-30
"""Weights are in single precision, which holds smaller ones badly or not at all."""


class WeightedSft(Imitation):
    """Sum of w * cross-entropy over tokens, over the sum of w over the tokens of the optimizer step; with `per_sequence` over responses.

    So every step moves the policy as far, also one of bad responses only. The tag in the prompt that C-RLFT tells its classes apart by
    belongs into the prompts; there is none here.
    """

    weighable = False

    per_sequence: bool = False
    beta: float = Field(1.0, gt=0)
    """w = exp(score / beta): small looks at the best responses of the iteration only."""
    threshold: float | None = None
    """Two classes instead: w = 1 from this score on, `low_weight` below it."""
    low_weight: float = Field(0.1, ge=0, le=1)

    @field_validator("low_weight")
    @classmethod
    def _is_read(cls, weight: float, info: ValidationInfo) -> float:
        if weight != cls.model_fields["low_weight"].default and info.data.get("threshold", 0) is None:
            raise ValueError("threshold is null, so there are no classes")
        return weight

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself; its weight depends on all of them."""
        sequences, dropped = judged_sequences(judged)
        return sample_items(judged, sequences), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """With their weights, of which the highest of the iteration is 1, and as so many units as they weigh."""
        scores = np.array([item.sequences[0].score for item in items])
        if self.threshold is None:
            weights = np.exp((scores - scores.max(initial=-np.inf)) / self.beta)
            weights[weights < LEAST] = 0.0
        else:
            weights = np.where(scores >= self.threshold, 1.0, self.low_weight)
        for item, weight in zip(items, weights.tolist(), strict=True):
            yield replace(item, weight=weight, units=weight * item.count(self.unit))
