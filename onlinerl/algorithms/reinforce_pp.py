"""REINFORCE++: "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from onlinerl.algorithms._paid_kl import PaidKl
from onlinerl.algorithms._policy_gradient import Clipped
from onlinerl.loss import LossOutput
from onlinerl.ops.items import judged_sequences, sample_items, with_sequence
from onlinerl.ops.whitening import whitening

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, TrainSequence


class ReinforcePp(PaidKl, Clipped):
    """PPO without a critic: advantages are returns, whitened over all tokens of the iteration, of which long responses have more. Where all
    scores are nearly the same, that blows up what is left of the rewards, the KL. One response per prompt will do."""

    unit = "token"

    kl_coef: float = Field(0.01, ge=0)
    """Price of one nat of KL to the reference, in units of the score. It is paid inside the reward, by the policy that sampled."""
    gamma: float = Field(1.0, ge=0, le=1)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself; advantages need its log-probs."""
        sequences, dropped = judged_sequences(judged)
        return sample_items(judged, sequences), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """Whitened returns as advantages, f32[T]."""
        scaled = whitening(lambda: (self.returns(item.sequences[0]) for item in items))
        for item, s in ((item, item.sequences[0]) for item in items):
            yield with_sequence(item, s.with_(advantages=scaled(self.returns(s)).astype(np.float32)))

    def returns(self, sequence: TrainSequence) -> np.ndarray:
        """G[T] = r_t + gamma G_{t+1}; a token's reward is minus the price of its KL (k1), and the last one's has the score as well."""
        rewards = np.zeros(len(sequence.response_ids))
        if self.kl_coef > 0:
            rewards -= self.kl_coef * self.nats(sequence)
        rewards[-1:] += self.score(sequence)  # a slice, because an empty response has no last token
        return np.array([*accumulate(rewards[::-1].tolist(), lambda later, now: now + self.gamma * later)][::-1], np.float64)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens; see `surrogate` for what it raises."""
        loss_BT, metrics = self.surrogate(outputs, batch, (self.clip_range_low, self.clip_range_high, self.dual_clip))
        loss = LossOutput(total=(loss_BT.sum(dim=1) * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)
