"""DNO, regression form: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", Algorithm 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.items import pair_items
from onlinerl.ops.preference import by_pair, logistic, margin, pair_metrics
from onlinerl.protocols import Algorithm, Needs
from onlinerl.types import Judged, Pair, TrainItem, Unit


class Dno(Algorithm):
    """Mean over pairs of q f(z) + (1 - q) f(-z), z = eta (D_1 - D_2), q = sigmoid(r_1 - r_2), r the win rates within the group.

    The optimum is D_1 - D_2 = (r_1 - r_2) / eta: the log-ratio margin becomes the difference of win rates, one step of soft policy
    iteration. Win rates differ by less than 1, so q stays within [0.27, 0.73] unless `reward_scale` stretches them.
    """

    eta: float = Field(0.1, gt=0)
    reward_scale: float = Field(1.0, gt=0)
    """Win rates are multiplied by this; the paper has 1."""

    metrics = (("target_prob", "Probability that a pair is trained towards", "ratio"),)

    def needs(self) -> Needs:
        """Pairs and the reference."""
        return Needs(pairs=True, reference=True, preferences=True, min_samples=2)

    @property
    def unit(self) -> Unit:
        """Pairs."""
        return "pair"

    @property
    def default_reference(self) -> Literal["fixed", "previous", "none"]:
        """The policy at the iteration's start."""
        return "previous"

    @property
    def loss_at_reference(self) -> float | None:
        """With z = 0 both orientations give ln 2, whatever q."""
        return math.log(2)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs, without those of identical or unjudged responses."""
        return pair_items(judged, pairs)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs.

        Raises:
            ValueError: if reference log-probs are missing.
        """
        z_P = self.eta * margin(outputs, batch)
        rate_1, rate_2 = by_pair(batch.win_rates_B, batch)
        q_P = torch.sigmoid(self.reward_scale * (rate_1 - rate_2))
        loss_P = logistic(z_P, q_P)
        metrics = pair_metrics(outputs, batch, z_P) | {"preference_loss": Mean.of(loss_P), "target_prob": Mean.of(q_P)}
        return LossOutput(total=(loss_P * batch.weight_P).sum(), metrics=metrics)
