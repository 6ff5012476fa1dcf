"""Online DPO: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" on pairs from the current policy, as in
"Direct Language Model Alignment from Online AI Feedback"."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._margin import Margin


class Dpo(Margin):
    """phi(z) = -log sigmoid(z) (equation 7): the log-likelihood of the labels by Bradley-Terry, with beta D as rewards."""

    def phi(self, z_P: Tensor) -> Tensor:
        """Slope sigmoid(z) - p, so the optimum is z = logit(p)."""
        return -logsigmoid(z_P)
