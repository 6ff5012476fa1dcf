"""KTO: "KTO: Model Alignment as Prospect Theoretic Optimization"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._labelled import Labelled

if TYPE_CHECKING:
    from onlinerl.ops.whole_step import Rows


class Kto(Labelled):
    """Mean over responses of w_d (1 - sigmoid(beta (D - z))) if desirable, w_u (1 - sigmoid(beta (z - D))) if not; z without gradient.

    z = max(0, mean of D over the optimizer step) stands for the KL to the reference. The paper estimates it from prompts with another
    prompt's response, because its data are not the policy's own; here they are, and D itself is what the KL is the mean of.
    """

    undesirable_weight: float = Field(1.0, ge=0)
    """The paper keeps desirable_weight * desirable responses over undesirable_weight * undesirable ones between 1 and 1.5."""

    def shift(self, rows: Rows) -> Tensor:
        """The mean over all responses that count."""
        ratios_N = rows.values_N.detach()[rows.weight_N > 0]
        return self.beta * (ratios_N.sum() / max(1, len(ratios_N))).clamp(min=0.0)

    def labelled_loss(self, z_N: Tensor) -> Tensor:
        """1/2 at 0."""
        return torch.sigmoid(-z_N)
