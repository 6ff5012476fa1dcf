"""DNO, regression form: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.loss import Mean
from onlinerl.ops.margins import logistic, margin
from onlinerl.ops.preference import by_pair
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.protocols.needs import Needs


class Dno(Pairwise):
    """Mean over pairs of q f(z) + (1 - q) f(-z), z = eta (D_1 - D_2), q = sigmoid(r_1 - r_2), r the win rates within the group.

    The optimum is D_1 - D_2 = (r_1 - r_2) / eta: the log-ratio margin becomes the difference of win rates, one step of soft policy
    iteration. Win rates differ by less than 1, so q stays within [0.27, 0.73] unless `reward_scale` stretches them.
    """

    reference = "previous"  # win rates are against the responses of the policy that the iteration starts from

    eta: float = Field(0.1, gt=0)
    reward_scale: float = Field(1.0, gt=0)
    """Win rates are multiplied by this; the paper has 1."""

    metrics = (Reported("target_prob", "Probability that a pair is trained towards", "ratio"),)

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with win rates."""
        return replace(super().needs, preferences=True)

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """With z = 0 both orientations give ln 2, whatever q."""
        return self.unless_modified(math.log(2))

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """The loss, z, and the mean of q."""
        z_P = self.eta * margin(outputs, batch)
        rate_1, rate_2 = by_pair(batch.win_rates_B, batch)
        q_P = torch.sigmoid(self.reward_scale * (rate_1 - rate_2))
        return logistic(z_P, q_P), z_P, {"target_prob": Mean.of(q_P)}
