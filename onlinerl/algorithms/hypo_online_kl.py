"""HyPO: "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._listwise import Lists, WithLikelihood
from onlinerl.ops.online_kl import online_kl
from onlinerl.ops.preference import log_ratios
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs


class HypoOnlineKl(WithLikelihood):
    """f(beta (D_w - D_l)) of the best and the worst response of a group, plus `lam` times an estimate of KL(policy || reference) on all.

    The estimate is the mean over responses of sg[D - b] D, b the mean D of the others: its gradient is that of the KL where the responses are
    samples of the policy. They are those of the policy that the iteration started from, so keep the optimizer steps of an iteration few.
    """

    needs = Needs(reference=True, min_samples=2, off_policy="approximate")
    keeps_repeats = True

    beta: float = Field(0.05, gt=0)
    lam: float = Field(1e-4, ge=0)
    """Price of one nat of KL; the paper's lie between 1e-4 and 1e-2."""

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """D."""
        return log_ratios(outputs, batch)

    def list_loss(self, lists: Lists) -> Tensor:
        """Both terms."""
        sizes_G = lists.valid_GK.sum(dim=1)
        ratios_GK = lists.values_GK.masked_fill(~lists.valid_GK, 0.0)
        worst_G = ratios_GK.gather(1, (sizes_G - 1).clamp(min=0)[:, None])[:, 0]
        kl_G = online_kl(lists.values_GK, lists.valid_GK)
        return -logsigmoid(self.beta * (ratios_GK[:, 0] - worst_G)) + self.lam * kl_G
