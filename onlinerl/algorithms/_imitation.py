"""What supervised learning on the policy's own responses shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.logprobs import lengths, masked
from onlinerl.protocols.algorithm import Algorithm, by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.training import Unit


class Imitation(Algorithm):
    """Cross-entropy times the weight of the item. Nothing is pushed down, so entropy and diversity fall with every iteration."""

    needs = Needs(off_policy="valid")  # whoever wrote a response, it is what shall be imitated
    reference = "none"
    metrics: ClassVar[tuple[Reported, ...]] = (
        Reported("nll", "Negative log-prob of what is imitated, without weights", "nats/token"),
    )

    per_sequence: bool = True
    """Mean over the tokens of a response and then over responses, or over all tokens."""

    @by_knobs
    def unit(self) -> Unit:
        """What the outer mean is taken over."""
        return "sequence" if self.per_sequence else "token"

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens, or over responses of their token mean."""
        nll_BT = -masked(outputs.logprobs_BT, batch.mask_BT)
        loss_B = nll_BT.sum(dim=1) / (lengths(batch) if self.per_sequence else 1.0)
        metrics = {
            "nll": Mean.of(nll_BT, batch.mask_BT),
            "response_length": Mean.of(batch.lengths_B, batch.mask_BT.any(dim=1)),
        }
        return LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
