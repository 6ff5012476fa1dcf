"""RSO: "Statistical Rejection Sampling Improves Preference Optimization"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._margin import Margin
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs


class Rso(Margin):
    """phi(z) = -log sigmoid(z) or max(0, 1 - z), on pairs of responses that were drawn by rejection (`pairing.name: rso` by default).

    The paper calls both normalized because z has the reference in it, unlike the hinge of SLiC-HF. `beta` is its gamma; its beta, of the
    rejection, is `pairing.beta`.
    """

    beta: float = Field(0.05, gt=0)
    """Small lets the policy go far from the reference."""
    loss_type: Literal["sigmoid_norm", "hinge_norm"] = "sigmoid_norm"
    """Whether a pair that is right by a margin of 1 still teaches."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a margin loss, with its own pairs."""
        return replace(super().needs, pairing="rso")

    def phi(self, z_P: Tensor) -> Tensor:
        """Slope sigmoid(z) - 1, or -1 below 1 and 0 above."""
        return -logsigmoid(z_P) if self.loss_type == "sigmoid_norm" else torch.relu(1.0 - z_P)
