"""REINFORCE: "Learning from Reference Answers: Versatile Language Model Alignment without Binary Human Preference Data"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Literal

import numpy as np

from onlinerl.algorithms._policy_gradient import PolicyGradient
from onlinerl.loss import LossOutput
from onlinerl.ops.advantages import group_advantages, leave_one_out, unbiased_std
from onlinerl.ops.items import judged_sequences, need, sample_items, with_advantages, with_sequence
from onlinerl.ops.logprobs import lengths
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class ReinforceScalar(PolicyGradient):
    """-(r - b) log pi(response) for any score r, e.g. its similarity to a reference answer; no ratio and no clip, so it is for few steps.
    Without a KL (`kl_coef`, k3 of each token) text drifts to whatever the score likes: watch its length and what it repeats."""

    unit = "sequence"
    metrics = (Reported("score_mean", "Mean score of the training responses", "reward", "iteration"),)

    baseline: Literal["none", "group_mean", "loo", "batch_mean", "ema"] = "group_mean"
    """b: 0, the mean score of the group, of the others in it, of the iteration, or a running one of earlier iterations (0.9 of it stays)."""
    adv_norm: Literal["none", "std"] = "none"
    """Whether r - b is divided by its standard deviation over the responses of the iteration."""
    agg: Literal["seq_mean_token_sum", "seq_mean_token_mean"] = "seq_mean_token_sum"
    """The log-prob of a response: the sum over its tokens, or their mean."""

    @by_knobs
    def least(self) -> int:
        """Two if the group is the baseline."""
        return 2 if self.baseline in ("group_mean", "loo") else 1

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with r - b on every token if its group gives the baseline, else with r."""
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        scores = [s.score for s in sequences]
        gains = scores if self.least == 1 else (leave_one_out if self.baseline == "loo" else group_advantages)(scores)
        return sample_items(judged, with_advantages(sequences, gains)), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """Subtracts the other baselines, and divides by the standard deviation."""
        means = [figures["score_mean"] for figures in (*past, self.figures(items)) if figures]
        known = (means[:-1] or means) if self.baseline == "ema" else means[-1:]
        running = reduce(lambda old, new: 0.9 * old + 0.1 * new, known or [0.0])
        shift = running if self.baseline in ("batch_mean", "ema") else 0.0
        gains = (need(item.sequences[0], "advantages")[:1] for item in items)
        std = unbiased_std(np.concatenate([np.zeros(0), *gains])) + 1e-6 if self.adv_norm == "std" else 1.0
        for item, s in ((item, item.sequences[0]) for item in items):
            yield with_sequence(item, s.with_(advantages=((need(s, "advantages") - shift) / std).astype(np.float32)))

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """The mean score, which later iterations must know."""
        return {"score_mean": float(np.mean([item.sequences[0].score for item in items]))} if items else {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over responses; see `surrogate` for what it raises."""
        loss_BT, metrics = self.surrogate(outputs, batch, (np.inf, np.inf, None), of="none")
        loss_B = loss_BT.sum(dim=1) / (lengths(batch) if self.agg == "seq_mean_token_mean" else 1.0)
        loss = LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)
