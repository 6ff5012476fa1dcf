"""DNO, regression form: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", Algorithm 1."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.preference import by_pair, logistic, margin, pair_metrics
from onlinerl.protocols.algorithm import Needs, Reported


class Dno(Pairwise):
    """Mean over pairs of q f(z) + (1 - q) f(-z), z = eta (D_1 - D_2), q = sigmoid(r_1 - r_2), r the win rates within the group.

    The optimum is D_1 - D_2 = (r_1 - r_2) / eta: the log-ratio margin becomes the difference of win rates, one step of soft policy
    iteration. Win rates differ by less than 1, so q stays within [0.27, 0.73] unless `reward_scale` stretches them.
    """

    # Win rates are against the responses of the policy that the iteration starts from.
    needs = Needs(pairs=True, reference=True, preferences=True, min_samples=2, off_policy="approximate")
    reference = "previous"
    loss_at_reference = math.log(2)  # with z = 0 both orientations give it, whatever q

    eta: float = Field(0.1, gt=0)
    reward_scale: float = Field(1.0, gt=0)
    """Win rates are multiplied by this; the paper has 1."""

    metrics = (Reported("target_prob", "Probability that a pair is trained towards", "ratio"),)

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
