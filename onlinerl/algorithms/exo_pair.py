"""EXO on pairs: "Towards Efficient and Exact Optimization of Language Model Alignment", equation 16."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._margin import Margin


class ExoPair(Margin):
    """phi(z) = KL(q || (1 - eps, eps)), q = (sigmoid(z), sigmoid(-z)): the reverse of the KL that DPO minimizes."""

    eps: float = Field(1e-3, gt=0, lt=0.5)
    """Probability that the label gives to the rejected response; the optimum is z = logit(1 - eps). The authors' code has exp(-10)."""

    def phi(self, z_P: Tensor) -> Tensor:
        """0 at the optimum."""
        won, lost = logsigmoid(z_P), logsigmoid(-z_P)
        return torch.exp(won) * (won - math.log1p(-self.eps)) + torch.exp(lost) * (lost - math.log(self.eps))
