"""GRPO: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from onlinerl.algorithms._policy_gradient import Clipped
from onlinerl.loss import LossOutput
from onlinerl.ops.advantages import group_advantages, unbiased_std
from onlinerl.ops.items import judged_sequences, need, sample_items, with_advantages, with_sequence
from onlinerl.ops.logprobs import lengths
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, Unit


class Grpo(Clipped):
    """Clipped surrogate (equation 3) plus `kl_coef` times the KL to the reference (k3, equation 4), without a critic: the mean score of a
    prompt's own responses is the baseline.

    The published variants differ in `std_norm` and `agg`, and neither choice is neutral: a run's stored configuration always states them.
    Not the paper's: `kl_coef`, 0.04 there; a reference is a second model in memory, and later recipes do without.
    """

    least = 2

    std_norm: Literal["group", "batch", "none"] = "group"
    """What centred scores are divided by: the group's standard deviation (the paper), that of all centred scores of the iteration,
    or nothing. Dividing by the group's gives nearly solved and nearly failed prompts more weight."""
    agg: Literal["seq_mean_token_mean", "token_mean"] = "seq_mean_token_mean"
    """Mean over the tokens of a response and then over responses (the paper), or over all tokens. The former favours short right and
    long wrong answers."""

    @by_knobs
    def unit(self) -> Unit:
        """What `agg` takes the outer mean over."""
        return "token" if self.agg == "token_mean" else "sequence"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with advantages A = (r - mean) / std of those of its group on every token."""
        # Here and not in `prepare`, because this is where a group is whole.
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        advantages = group_advantages([self.score(s) for s in sequences], normalise=self.std_norm == "group")
        return sample_items(judged, with_advantages(sequences, advantages)), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """For `std_norm: batch`, divide by the standard deviation of the iteration's centred scores."""
        if self.std_norm != "batch":
            return items
        centred = (need(item.sequences[0], "advantages").astype(np.float32) for item in items)
        std = unbiased_std(np.array([a[0] for a in centred if a.size]))
        scale = np.float32(0.0 if std < 1e-8 else 1.0 / (std + 1e-6))
        sequences = ((item, item.sequences[0]) for item in items)
        return (with_sequence(i, s.with_(advantages=need(s, "advantages").astype(np.float32) * scale)) for i, s in sequences)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens, or over responses of their token mean; see `surrogate` for what it raises."""
        loss_BT, metrics = self.surrogate(outputs, batch, (self.clip_range_low, self.clip_range_high, self.dual_clip))
        loss_B = loss_BT.sum(dim=1)
        if self.agg == "seq_mean_token_mean":
            loss_B = loss_B / lengths(batch)
        loss = LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)
