"""APO-down: "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment"."""

from __future__ import annotations

import torch
from torch import Tensor

from onlinerl.algorithms._rewards import Rewards
from onlinerl.protocols.algorithm import by_knobs


class ApoDown(Rewards):
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l): both responses lose probability, the rejected one more.

    For a policy that is better than its chosen responses.
    """

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """1/2 + 1 - 1/2."""
        return self.unless_modified(1.0)

    def of_rewards(self, won_P: Tensor, lost_P: Tensor) -> Tensor:
        """Bounded in (0, 2)."""
        return torch.sigmoid(won_P) + 1.0 - torch.sigmoid(won_P - lost_P)
