"""SPPO on labels taken for certain, as in the libraries: "Self-Play Preference Optimization for Language Model Alignment"."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._rewards import Rewards
from onlinerl.protocols.algorithm import by_knobs


class SppoHard(Rewards):
    """(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2: a sum, twice the mean of `sppo_single` with p = 1."""

    reference = "previous"

    beta: float = Field(0.001, gt=0)
    """1 / eta of `sppo`."""

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """With both log-ratios 0."""
        return self.unless_modified(0.5 / self.beta**2)

    def of_rewards(self, won_P: Tensor, lost_P: Tensor) -> Tensor:
        """Targets of hundreds of nats, which are not meant to be reached."""
        return ((won_P - 0.5).square() + (lost_P + 0.5).square()) / self.beta**2
