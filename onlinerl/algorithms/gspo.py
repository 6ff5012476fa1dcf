"""GSPO: "Group Sequence Policy Optimization"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from onlinerl.algorithms._policy_gradient import Clipped
from onlinerl.loss import LossOutput
from onlinerl.ops.advantages import group_advantages
from onlinerl.ops.items import judged_sequences, sample_items, with_advantages
from onlinerl.ops.logprobs import lengths

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Gspo(Clipped):
    """GRPO with one ratio for the whole response, s = exp(mean over its tokens of lp - old): it is clipped as a whole or not at all.

    In the form for tokens, s_t = sg[s] exp(lp_t - sg[lp_t]), which has the same value and the same gradient, and in which each token has its
    own weight for who sampled it.
    """

    unit = "sequence"
    least = 2

    clip_range_low: float = Field(3e-4, gt=0)
    clip_range_high: float = Field(4e-4, gt=0)
    """Ratios outside [1 - clip_range_low, 1 + clip_range_high] earn nothing more. A mean moves about a thousand times less than the
    ratio of one token: 0.2 would never clip."""

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with A = (r - mean) / std of its group on every token."""
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        advantages = group_advantages([s.score for s in sequences], normalise=True)
        return sample_items(judged, with_advantages(sequences, advantages)), dropped

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over responses of their token mean; see `surrogate` for what it raises."""
        bounds = (self.clip_range_low, self.clip_range_high, self.dual_clip)
        loss_BT, metrics = self.surrogate(outputs, batch, bounds, of="response_mean")
        loss = LossOutput(total=(loss_BT.sum(dim=1) / lengths(batch) * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)
