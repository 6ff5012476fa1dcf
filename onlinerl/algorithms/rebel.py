"""REBEL: "REBEL: Reinforcement Learning via Regressing Relative Rewards", equation 1."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.logprobs import masked
from onlinerl.ops.margins import margin
from onlinerl.ops.preference import by_pair
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.types.plan import Objection, Plan

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs


class Rebel(Pairwise):
    """(h / eta - (r_1 - r_2))^2, h against the policy of the iteration's start: the margin is brought to the difference of the scores.

    r is the score, less `kl_coef` log(pi_t / base) of the response, pi_t the policy of the iteration's start. The authors' code has eta^2 times
    this loss. Not the paper's: `kl_coef`, 0.05 there; it takes the base model's log-probs beside the reference's, and in a run of
    one iteration, where it is always 0, would be refused.
    """

    reference = "previous"

    eta: float = Field(1.0, gt=0)
    """Nats of margin per unit of score."""
    length_norm: bool = False
    """Means over tokens in the place of sums, so that long responses need not move further. `eta` is then in nats per token."""

    kl_coef: float = Field(0.0, ge=0)
    """What a nat costs by which a response is more probable than under the base model, in units of the score."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with the base model beside the reference if the distance to it has a price."""
        return replace(super().needs, anchor=self.kl_coef > 0)

    def objection(self, plan: Plan) -> Objection | None:
        """A price of something that is always 0."""
        if not self.kl_coef or any(plan.references):
            return super().objection(plan)
        cause = f"is {self.kl_coef}, and the reference is the base model in every iteration, to which it has no distance"
        return Objection(field="algorithm.kl_coef", cause=cause, fix="set it to 0, or raise iterations")

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """A square per pair."""
        z_P = margin(outputs, batch, per_token=self.length_norm) / self.eta
        rewards_B = batch.scores_B
        if self.kl_coef:
            moved_BT = masked(batch.need("reference_logprobs_BT") - batch.need("anchor_logprobs_BT"), batch.mask_BT)
            rewards_B = rewards_B - self.kl_coef * moved_BT.sum(dim=1)
        better, worse = by_pair(rewards_B, batch)
        return (z_P - (better - worse)).square(), z_P, {}
