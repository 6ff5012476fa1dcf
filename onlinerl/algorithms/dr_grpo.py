"""Dr. GRPO: "Understanding R1-Zero-Like Training: A Critical Perspective"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from onlinerl.algorithms._policy_gradient import Clipped
from onlinerl.loss import LossOutput
from onlinerl.ops.advantages import group_advantages
from onlinerl.ops.items import judged_sequences, sample_items, with_advantages

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.plan import Plan
    from onlinerl.types.training import TrainItem


class DrGrpo(Clipped):
    """GRPO without two of its biases: advantages are r - mean, so that groups with little spread do not count more, and the losses of the
    tokens are summed and divided by one constant, so that no token counts less for being in a long response."""

    unit = "sequence"
    least = 2

    max_length: int = Field(1024, ge=1)
    """The constant. In the paper it is the length to which responses may grow, here `sampling.max_new_tokens`; never the length of a
    batch. Another constant is another learning rate, but for what Adam and the clipping of the gradient make of that."""

    def remarks(self, plan: Plan) -> list[str]:
        """A constant that is not the longest response."""
        if plan.max_new_tokens in (None, self.max_length):
            return []
        return [
            f"losses are divided by algorithm.max_length={self.max_length}, and responses have at most {plan.max_new_tokens} tokens "
            f"(sampling.max_new_tokens): the paper's constant is algorithm.max_length={plan.max_new_tokens}"
        ]

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with A = r - mean of its group on every token."""
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        advantages = group_advantages([s.score for s in sequences])
        return sample_items(judged, with_advantages(sequences, advantages)), dropped

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens, over `max_length`; see `surrogate` for what it raises."""
        loss_BT, metrics = self.surrogate(outputs, batch, (self.clip_range_low, self.clip_range_high, self.dual_clip))
        loss = LossOutput(total=(loss_BT.sum(dim=1) * batch.weight_B).sum() / self.max_length, metrics=metrics)
        return self.with_terms(loss, outputs, batch)
