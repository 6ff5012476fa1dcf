"""NCA on pairs: "Noise Contrastive Alignment of Language Models with Explicit Rewards"."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._rewards import Rewards
from onlinerl.protocols.algorithm import by_knobs


class NcaPair(Rewards):
    """f(r_w) + f(-r_w) / 2 + f(-r_l) / 2, f(r) = -log sigmoid(r): it keeps the chosen response probable, not only ahead."""

    beta: float = Field(0.01, gt=0)

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """Twice ln 2."""
        return self.unless_modified(2 * math.log(2))

    def of_rewards(self, won_P: Tensor, lost_P: Tensor) -> Tensor:
        """For a fixed r_l smallest at r_w = ln 2."""
        return -logsigmoid(won_P) - 0.5 * (logsigmoid(-won_P) + logsigmoid(-lost_P))
