"""PRO: "Preference Ranking Optimization for Human Alignment"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._listwise import Lists, Listwise, logsumexp_of
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.preference import sequence_logprobs
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


class Pro(Listwise):
    """sum_k -log [e^(s_k d_kk) / (e^(s_k d_kk) + sum_{j > k} e^(s_j d_kj))] + sft_coef (K - 1)^2 (-S_1), without a reference.

    s is the log-prob per token, d_kj = r_k - r_j the gap between two scores and d_kk the largest of them, the best response first; S_1 is
    the log-prob of the best one, summed over its tokens as in the authors' code.
    """

    needs = Needs(min_samples=2, off_policy="valid")

    sft_coef: float = Field(0.05, ge=0)

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """s."""
        return sequence_logprobs(outputs, batch) / lengths(batch)

    def list_loss(self, lists: Lists) -> Tensor:
        """A softmax per response that another one comes behind."""
        below_GKK, labels_GK = lists.below_GKK, lists.labels_GK
        gaps_GKK = (labels_GK[:, :, None] - labels_GK[:, None, :]).masked_fill(~below_GKK, 0.0)
        largest_GK = gaps_GKK.max(dim=2).values  # gaps are not negative: the best comes first
        own_GK = lists.values_GK * largest_GK
        scaled_GKK = lists.values_GK[:, None, :] * gaps_GKK + own_GK.diag_embed()
        counts_GK = below_GKK.any(dim=2)
        rest_GK = logsumexp_of(scaled_GKK, below_GKK | counts_GK.diag_embed())
        ranking_G = (rest_GK - own_GK).masked_fill(~counts_GK, 0.0).sum(dim=1)
        best_G = lists.values_GK[:, 0] * lists.lengths_GK[:, 0]
        return ranking_G - self.sft_coef * counts_GK.sum(dim=1).square() * best_G
