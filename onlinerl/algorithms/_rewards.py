"""Losses of the two rewards of a pair, which look at more than their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.preference import by_pair, log_ratios

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean


class Rewards(Pairwise):
    """Mean over pairs of `of_rewards(r_w, r_l)`, r = beta D: what each response gained against the reference. A subclass is that formula."""

    beta: float = Field(0.1, gt=0)
    """Small lets the policy go far from the reference."""

    def of_rewards(self, won_P: Tensor, lost_P: Tensor) -> Tensor:
        """The loss of each pair, [P]."""
        raise NotImplementedError

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """With z the difference of the rewards."""
        won_P, lost_P = by_pair(self.beta * log_ratios(outputs, batch), batch)
        return self.of_rewards(won_P, lost_P), won_P - lost_P, {}
