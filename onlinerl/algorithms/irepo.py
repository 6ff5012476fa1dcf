"""iREPO: "iREPO: implicit Reward Pairwise Difference based Empirical Preference Optimization"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.margins import margin
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs


class Irepo(Pairwise):
    """(logit(p) - beta h)^2, h against the policy of the iteration's start: the margin is brought to what the probability says."""

    reference = "previous"

    beta: float = Field(0.1, gt=0)
    length_norm: bool = False
    """Means over tokens in the place of sums, so that long responses need not move further. `beta` then grows by about the mean length."""
    prob_clip: float = Field(0.02, gt=0, lt=0.5)
    """Probabilities count as at least this and at most 1 minus this: the logit of a certain one is infinite."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with probabilities."""
        return replace(super().needs, preferences=True)

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """A square per pair."""
        z_P = self.beta * margin(outputs, batch, per_token=self.length_norm)
        target_P = torch.logit(batch.prob_P.clamp(self.prob_clip, 1.0 - self.prob_clip))
        return (target_P - z_P).square(), z_P, {}
