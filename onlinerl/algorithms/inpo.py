"""INPO: "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.logprobs import lengths, masked, token_log_ratios
from onlinerl.ops.preference import by_pair
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.plan import Plan


class Inpo(Pairwise):
    """(log pi(w) / pi(l) - a log base(w) / base(l) - (1 - a) log pi_t(w) / pi_t(l) - 1 / (2 eta))^2, a = tau / eta.

    Two anchors: the base model, and the policy of the iteration's start, pi_t. The margin against their geometric mixture is brought to a
    constant, which at the published eta is 100 nats and is not meant to be reached.
    """

    reference = "previous"

    eta: float = Field(0.005, gt=0)
    """The margin is asked to grow by 1 / (2 eta) nats."""
    anchor_weight: float = Field(1 / 3, ge=0, le=1)
    """tau / eta, the share of the base model in what the policy is held to: the KL of the paper's regularised game. With 0 the base model
    is not asked."""

    length_norm: bool = False
    """Means over tokens in the place of sums, so that long responses need not move further. The target is then in nats per token."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with the base model beside the reference."""
        return replace(super().needs, anchor=self.anchor_weight > 0)

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """With policy, iterate and base model one and the same: the square of the target."""
        return self.unless_modified((0.5 / self.eta) ** 2)

    def remarks(self, plan: Plan) -> list[str]:
        """Where the two anchors are one."""
        if self.anchor_weight > 0 and not any(plan.references):
            return ["the reference is the base model in every iteration, and so is the anchor: anchor_weight changes nothing"]
        return []

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """A square per pair; z is the margin against the mixture, in units of its target."""
        ratios_BT = token_log_ratios(outputs, batch)
        if self.anchor_weight > 0:  # from the iterate to the mixture, token by token: sums would leave little of the difference
            anchor_BT, reference_BT = batch.need("anchor_logprobs_BT"), batch.need("reference_logprobs_BT")
            ratios_BT = ratios_BT - self.anchor_weight * masked(anchor_BT - reference_BT, batch.mask_BT)
        ratios_B = ratios_BT.sum(dim=1)
        chosen, rejected = by_pair(ratios_B / lengths(batch) if self.length_norm else ratios_B, batch)
        margin_P, target = chosen - rejected, 0.5 / self.eta
        return (margin_P - target).square(), margin_P / target, {}
