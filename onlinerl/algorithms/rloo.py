"""RLOO: "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from onlinerl.algorithms._paid_kl import PaidKl
from onlinerl.algorithms._policy_gradient import Clipped
from onlinerl.loss import LossOutput
from onlinerl.ops.advantages import leave_one_out
from onlinerl.ops.items import judged_sequences, need, sample_items, with_advantages, with_sequence
from onlinerl.ops.logprobs import lengths

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Rloo(PaidKl, Clipped):
    """A response is one action: its reward is r = score - kl_coef * sum_t (old - reference), its baseline the mean reward of the other
    responses to the prompt, and one ratio, the product over its tokens, is clipped.

    That product saturates on long answers (`clamped`); gspo takes the mean. The first step on what was sampled is REINFORCE.
    """

    unit = "sequence"
    least = 2

    kl_coef: float = Field(0.05, ge=0)
    """Price of one nat of KL to the reference, in units of the score. It is paid inside the reward, by the policy that sampled."""
    importance_sampling_mode: Literal["sequence_truncate", "sequence_mask"] = "sequence_truncate"
    """Whether a response whose ratio is outside of floor and cap counts as that bound (`truncate`) or not at all (`mask`)."""

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with its score minus the mean score of the others on every token."""
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        return sample_items(judged, with_advantages(sequences, leave_one_out([self.score(s) for s in sequences]))), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """Takes off what the KL of a response costs more than that of the others, so that A = r_i - mean of r_j over j != i."""
        # The advantage is linear in the rewards: the scores' part was made where a group is whole, the rest is made here, where log-probs
        # are known. The items of a prompt follow one another; one that training.on_truncated left out has no log-probs.
        return self._paid(items) if self.kl_coef > 0 else items

    def _paid(self, items: Sequence[TrainItem]) -> Iterator[TrainItem]:
        for _, group in groupby(items, key=lambda item: item.prompt_id):
            members = list(group)
            kls = [self.nats(item.sequences[0]).sum() for item in members]
            more = leave_one_out(kls) if len(kls) > 1 else kls  # one that is left alone has nobody to be compared with
            for item, nats in zip(members, more, strict=True):
                gain = need(item.sequences[0], "advantages") - self.kl_coef * nats
                yield with_sequence(item, item.sequences[0].with_(advantages=gain.astype(np.float32)))

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over responses; see `surrogate` for what it raises."""
        bounds = (self.clip_range_low, self.clip_range_high, self.dual_clip)
        loss_BT, metrics = self.surrogate(outputs, batch, bounds, of="response")  # the same at every token of a response
        loss = LossOutput(total=(loss_BT.sum(dim=1) / lengths(batch) * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)
