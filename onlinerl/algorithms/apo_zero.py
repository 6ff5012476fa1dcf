"""APO-zero: "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment"."""

from __future__ import annotations

import torch
from torch import Tensor

from onlinerl.algorithms._rewards import Rewards
from onlinerl.protocols.algorithm import by_knobs


class ApoZero(Rewards):
    """1 - sigmoid(r_w) + sigmoid(r_l): chosen responses gain probability and rejected ones lose it, each by itself.

    For responses better than those that the policy gives.
    """

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """1 - 1/2 + 1/2."""
        return self.unless_modified(1.0)

    def of_rewards(self, won_P: Tensor, lost_P: Tensor) -> Tensor:
        """Bounded in (0, 2)."""
        return 1.0 - torch.sigmoid(won_P) + torch.sigmoid(lost_P)
