"""TDPO2: "Token-level Direct Preference Optimization"."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms.tdpo1 import Tdpo1


class Tdpo2(Tdpo1):
    """TDPO1 with z = beta (h + alpha (sg[K_w] - K_l)): the preferred response's KL counts as a constant, so only the other one's is moved.

    `alpha: 0` is DPO.
    """

    alpha: float = Field(0.5, ge=0)
    """Weight of the KLs."""

    def correction(self, preferred_P: Tensor, other_P: Tensor) -> Tensor:
        """No gradient through the preferred response's."""
        return self.alpha * (preferred_P.detach() - other_P)
