"""TDPO1: "Token-level Direct Preference Optimization"."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms._labels import UncertainLabels
from onlinerl.loss import Mean
from onlinerl.ops.logprobs import masked
from onlinerl.ops.margins import margin
from onlinerl.ops.preference import by_pair
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.protocols.needs import Needs


class Tdpo1(UncertainLabels):
    """f(z) = -log sigmoid(z), z = beta (h + K_w - K_l), K = sum over a response of KL(reference || policy) of the next token.

    The KL is over the whole vocabulary, so the reference runs beside the policy. A response is worth beta (D + K) here, not beta D. A label
    that is right with probability p gives p f(z) + (1 - p) f(z'), z' being the z of the two in the other order.
    """

    metrics = (
        Reported("chosen_reference_kl", "KL(reference || policy), all tokens of the chosen response", "nats/sequence"),
        Reported("rejected_reference_kl", "KL(reference || policy), all tokens of the rejected response", "nats/sequence"),
    )

    beta: float = Field(0.1, gt=0)
    """Small lets the policy go far from the reference."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with the KL."""
        return replace(super().needs, reference_kl=True)

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """ln 2, whatever the label."""
        return self.unless_modified(math.log(2))

    def correction(self, preferred_P: Tensor, other_P: Tensor) -> Tensor:
        """What the KLs of the two responses add to the difference of their log-ratios, [P]."""
        return preferred_P - other_P

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """Of both orders of the two: with labels that may be wrong the rejected response is also the preferred one."""
        kl_w, kl_l = by_pair(masked(outputs.need("reference_kl_BT"), batch.mask_BT).sum(dim=1), batch)
        h_P, cap = margin(outputs, batch), self.margin_cap or math.inf
        z_P = (self.beta * (h_P + self.correction(kl_w, kl_l))).clamp(max=cap)
        swapped_P = (self.beta * (self.correction(kl_l, kl_w) - h_P)).clamp(min=-cap)
        prob_P = self.label_probs(batch)
        metrics = {"chosen_reference_kl": Mean.of(kl_w), "rejected_reference_kl": Mean.of(kl_l)}
        return -prob_P * logsigmoid(z_P) - (1.0 - prob_P) * logsigmoid(swapped_P), z_P, metrics
