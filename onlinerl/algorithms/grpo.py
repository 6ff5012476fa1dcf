"""GRPO: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from onlinerl.algorithms._policy_gradient import PolicyGradient
from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.advantages import group_advantages, unbiased_std
from onlinerl.ops.items import judged_sequences, need, sample_items, with_sequence
from onlinerl.ops.kl import k3
from onlinerl.ops.logprobs import lengths, token_log_ratios
from onlinerl.protocols.algorithm import Needs, by_knobs
from onlinerl.types.training import TrainItem, Unit

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class Grpo(PolicyGradient):
    """Clipped surrogate (equation 3) plus `kl_coef` times the KL to the reference (k3, equation 4), without a critic: the mean score of a
    prompt's own responses is the baseline.

    The published variants differ in `std_norm` and `agg`, and neither choice is neutral: the defaults are the paper's, and a run's
    stored configuration always states them.
    """

    std_norm: Literal["group", "batch", "none"] = "group"
    """What centred scores are divided by: the group's standard deviation (the paper), that of all centred scores of the iteration,
    or nothing. Dividing by the group's gives nearly solved and nearly failed prompts more weight."""
    agg: Literal["seq_mean_token_mean", "token_mean"] = "seq_mean_token_mean"
    """Mean over the tokens of a response and then over responses (the paper), or over all tokens. The former favours short right and
    long wrong answers."""
    clip_range_low: float = Field(0.2, gt=0)
    clip_range_high: float = Field(0.2, gt=0)
    """Ratios outside [1 - clip_range_low, 1 + clip_range_high] earn nothing more."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a policy gradient; a group of at least two."""
        return super().needs.model_copy(update={"min_samples": 2})

    @by_knobs
    def unit(self) -> Unit:
        """What `agg` takes the outer mean over."""
        return "token" if self.agg == "token_mean" else "sequence"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with advantages A = (r - mean) / std of those of its group on every token."""
        # Here and not in `prepare`, because this is where a group is whole; a prompt may occur twice in an iteration.
        sequences, dropped = judged_sequences(judged, at_least=2)
        if not sequences:
            return [], dropped
        advantages = group_advantages([s.score for s in sequences], normalise=self.std_norm == "group")
        filled = [
            s.with_(advantages=np.full(len(s.response_ids), a, dtype=np.float32))
            for s, a in zip(sequences, advantages, strict=True)
        ]
        return sample_items(judged, filled), dropped

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
        """Sum over tokens, or over responses of their token mean.

        Raises:
            ValueError: if a field named by `needs` is missing.
        """
        loss_BT, metrics = self.surrogate(outputs, batch, self.clip_range_low, self.clip_range_high)
        if self.kl_coef > 0:
            kl_BT = k3(token_log_ratios(outputs, batch))
            metrics["kl_reference"] = Mean.of(kl_BT, batch.mask_BT)
            loss_BT = loss_BT + self.kl_coef * kl_BT
        loss_B = loss_BT.sum(dim=1)
        if self.agg == "seq_mean_token_mean":
            loss_B = loss_B / lengths(batch)
        return LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
