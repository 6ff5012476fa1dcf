"""NBPO: Bradley-Terry with labels that were flipped at random, by forward correction of the likelihood.

Its namesake, for recommendation from implicit feedback, puts the noise on single items; this is the same idea on pairs.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._margin import Margin


class Nbpo(Margin):
    """phi(z) = -log((1 - eps) sigmoid(z) + eps sigmoid(-z)), between -log(1 - eps) and -log(eps): no single pair can dominate."""

    eps: float = Field(0.1, gt=0, lt=0.5)
    """Share of labels assumed to be flipped."""

    def phi(self, z_P: Tensor) -> Tensor:
        """Bounded on both sides."""
        return -torch.logaddexp(math.log1p(-self.eps) + logsigmoid(z_P), math.log(self.eps) + logsigmoid(-z_P))
