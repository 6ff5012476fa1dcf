"""SPPO on single comparisons: "Self-Play Preference Optimization for Language Model Alignment", with P of the pair for win rates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.ops.preference import by_pair, log_ratios
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs


class SppoSingle(Pairwise):
    """Mean over the two responses of (D -+ eta (p - 1/2))^2, p = P(chosen beats rejected)."""

    reference = "previous"

    eta: float = Field(1000.0, gt=0)
    """Nats per unit of probability; targets are not meant to be reached."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with probabilities."""
        return replace(super().needs, preferences=True)

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """Half the sum of two squares; z is the margin in units of eta."""
        won_P, lost_P = by_pair(log_ratios(outputs, batch), batch)
        target_P = self.eta * (batch.prob_P - 0.5)
        return 0.5 * ((won_P - target_P).square() + (lost_P + target_P).square()), (won_P - lost_P) / self.eta, {}
