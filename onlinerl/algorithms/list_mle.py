"""Plackett-Luce likelihood of a ranking, with beta D as rewards: "LiPO: Listwise Preference Optimization through Learning-to-Rank"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._listwise import Lists, WithLikelihood, logsumexp_of
from onlinerl.ops.preference import log_ratios

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


class ListMle(WithLikelihood):
    """-sum_k [s_k - logsumexp_{j >= k} s_j], the best response first, s = beta D. Of two responses it is DPO."""

    beta: float = Field(0.05, gt=0)

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """s."""
        return self.beta * log_ratios(outputs, batch)

    def list_loss(self, lists: Lists) -> Tensor:
        """Reads the order of the labels only."""
        valid_GK = lists.valid_GK
        rest_GKK = lists.below_GKK | valid_GK.diag_embed()
        rest_GK = logsumexp_of(lists.values_GK[:, None, :].expand(rest_GKK.shape), rest_GKK)
        return (rest_GK - lists.values_GK).masked_fill(~valid_GK, 0.0).sum(dim=1)
