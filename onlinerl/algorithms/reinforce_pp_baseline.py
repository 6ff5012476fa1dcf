"""REINFORCE++ with a baseline: "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from onlinerl.algorithms._policy_gradient import Clipped
from onlinerl.loss import LossOutput
from onlinerl.ops.items import judged_sequences, need, sample_items, with_advantages, with_sequence
from onlinerl.ops.ratios import k2
from onlinerl.ops.whitening import whitening

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class ReinforcePpBaseline(Clipped):
    """Scores minus the mean of their group, whitened over all tokens of the iteration, and a KL to the reference (k2) in the loss."""

    unit = "token"
    least = 2

    kl_coef: float = Field(0.01, ge=0)
    """Price of one nat of KL to the reference, in standard deviations of the advantages; 0 needs no reference."""

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, with its score minus the mean of its group on every token."""
        sequences, dropped = judged_sequences(judged, at_least=self.least)
        mean = sum(s.score for s in sequences) / max(len(sequences), 1)
        return sample_items(judged, with_advantages(sequences, [s.score - mean for s in sequences])), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """Whitens the advantages, f32[T]."""
        scaled = whitening(lambda: (need(item.sequences[0], "advantages") for item in items))
        for item in items:
            whitened = scaled(need(item.sequences[0], "advantages"))
            yield with_sequence(item, item.sequences[0].with_(advantages=whitened.astype(np.float32)))

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens; see `surrogate` for what it raises."""
        bounds = (self.clip_range_low, self.clip_range_high, self.dual_clip)
        loss_BT, metrics = self.surrogate(outputs, batch, bounds, kl=k2)
        loss = LossOutput(total=(loss_BT.sum(dim=1) * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)
