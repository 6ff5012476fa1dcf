"""REBEL: "REBEL: Reinforcement Learning via Regressing Relative Rewards", equation 1."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.preference import by_pair, margin


class Rebel(Pairwise):
    """(h / eta - (r_1 - r_2))^2, h against the policy of the iteration's start: the margin is brought to the difference of the scores.

    The paper's language runs take a share of the KL to the initial policy off the scores, which is not done here. Its code's loss is
    eta^2 times this one.
    """

    reference = "previous"

    eta: float = Field(1.0, gt=0)
    """Nats of margin per unit of score."""
    length_norm: bool = False
    """Means over tokens in the place of sums, so that long responses need not move further. `eta` is then in nats per token."""

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """A square per pair."""
        z_P = margin(outputs, batch, per_token=self.length_norm) / self.eta
        better, worse = by_pair(batch.scores_B, batch)
        return (z_P - (better - worse)).square(), z_P, {}
