"""SLiC with a normalized hinge: "Statistical Rejection Sampling Improves Preference Optimization"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onlinerl.algorithms._margin import Margin
from onlinerl.loss import Mean
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


class Slic(Margin):
    """phi(z) = max(0, 1 - z): a pair that is right by a margin of 1 teaches nothing more.

    The form of "SLiC-HF: Sequence Likelihood Calibration with Human Feedback" is `reference_free: true`, `beta: 1`, `nll_coef: 0.1`.
    """

    metrics = (Reported("active", "Share of pairs inside the hinge", "ratio"),)

    def phi(self, z_P: Tensor) -> Tensor:
        """Slope -1 below 1, and 0 above."""
        return torch.relu(1.0 - z_P)

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """With the share of pairs that still teach."""
        loss_P, z_P, metrics = super().pair_loss(outputs, batch)
        return loss_P, z_P, metrics | {"active": Mean.of(z_P < 1.0)}
