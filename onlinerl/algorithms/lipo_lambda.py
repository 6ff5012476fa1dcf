"""LiPO-lambda: "LiPO: Listwise Preference Optimization through Learning-to-Rank"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._listwise import Lists, WithLikelihood
from onlinerl.ops.preference import log_ratios
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


class LipoLambda(WithLikelihood):
    """Sum over pairs of a list of |G_i - G_j| |1 / ln(1 + rank_i) - 1 / ln(1 + rank_j)| f(s_i - s_j): what swapping the two changes in DCG.

    s = beta D, G = 2^label - 1, labels are win rates within the group; ranks are those of s, among equals (as at the start) those of the
    labels. No gradient flows through the weights.
    """

    needs = Needs(reference=True, min_samples=2, off_policy="valid", preferences=True)
    by_win_rate = True

    beta: float = Field(0.05, gt=0)
    list_reduce: Literal["sum", "mean_pairs"] = "sum"
    """Whether a list counts as the sum over its pairs, as in the paper, or as their mean."""

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """s."""
        return self.beta * log_ratios(outputs, batch)

    def list_loss(self, lists: Lists) -> Tensor:
        """Pairs of equal labels do not count."""
        worse_GKK = lists.worse_GKK
        open_GK = lists.values_GK.detach().masked_fill(~lists.valid_GK, float("-inf"))
        ranks_GK = open_GK.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
        discounts_GK, gains_GK = 1.0 / torch.log1p(ranks_GK.to(open_GK.dtype)), torch.exp2(lists.labels_GK.to(open_GK.dtype))
        weights_GKK = (_gaps(gains_GK) * _gaps(discounts_GK)).abs() * worse_GKK
        loss_G = -(weights_GKK * logsigmoid(_gaps(lists.values_GK))).sum(dim=(1, 2))
        return loss_G if self.list_reduce == "sum" else loss_G / worse_GKK.sum(dim=(1, 2)).clamp(min=1)


def _gaps(values_GK: Tensor) -> Tensor:
    return values_GK[:, :, None] - values_GK[:, None, :]
