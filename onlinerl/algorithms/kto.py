"""KTO: "KTO: Model Alignment as Prospect Theoretic Optimization"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.items import judged_sequences, sample_items
from onlinerl.ops.preference import log_ratios
from onlinerl.ops.whole_step import Rows, WholeStep
from onlinerl.protocols.algorithm import Needs, Reported, by_knobs
from onlinerl.types.training import TrainItem

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class Kto(WholeStep):
    """Mean over responses of w_d (1 - sigmoid(beta (D - z))) if desirable, w_u (1 - sigmoid(beta (z - D))) if not; z without gradient.

    z = max(0, mean of D over the optimizer step) stands for the KL to the reference. The paper estimates it from prompts with another
    prompt's response, because its data are not the policy's own; here they are, and D itself is what the KL is the mean of.
    """

    unit = "sequence"
    reference = "fixed"

    beta: float = Field(0.1, gt=0)
    desirable_weight: float = Field(1.0, ge=0)
    undesirable_weight: float = Field(1.0, ge=0)
    """The paper keeps desirable_weight * desirable responses over undesirable_weight * undesirable ones between 1 and 1.5."""
    threshold: float | None = None
    """Responses with this score or a higher one are desirable. None: those that win more than half of their comparisons within the group;
    those that win less are undesirable, and the others are left out."""

    metrics = (
        Reported("desirable", "Share of desirable responses", "ratio"),
        Reported("desirable_log_ratio", "log(policy / reference) of desirable responses", "nats/sequence"),
        Reported("undesirable_log_ratio", "log(policy / reference) of the others", "nats/sequence"),
    )

    @by_knobs
    def needs(self) -> Needs:
        """Without a threshold, responses to compare with."""
        compares = self.threshold is None
        return Needs(reference=True, min_samples=2 if compares else 1, preferences=compares, off_policy="valid")

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """Half the weight, whatever the label."""
        return 0.5 * self.desirable_weight if self.desirable_weight == self.undesirable_weight else None

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, but for those that are neither."""
        sequences, dropped = judged_sequences(judged, at_least=self.needs.min_samples)
        labelled = [s for s in sequences if self.threshold is not None or s.win_rate != 0.5]
        dropped["tie"] += len(sequences) - len(labelled)
        return sample_items(judged, labelled), +dropped

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """D."""
        return log_ratios(outputs, batch)

    def facts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Which ones are desirable."""
        return {"desirable": batch.win_rates_B > 0.5 if self.threshold is None else batch.scores_B >= self.threshold}

    def step_loss(self, rows: Rows) -> Tensor:
        """Of all responses of the step."""
        ratios_N, desirable_N = rows.values_N, rows.facts["desirable"] > 0
        z = (ratios_N.detach().sum() / max(1, len(ratios_N))).clamp(min=0.0)
        signs_N = torch.where(desirable_N, 1.0, -1.0)
        weights_N = torch.where(desirable_N, self.desirable_weight, self.undesirable_weight) * rows.weight_N
        return (weights_N * torch.sigmoid(-self.beta * signs_N * (ratios_N - z))).sum()

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """By class."""
        real_B, desirable_B = batch.weight_B > 0, self.facts(batch)["desirable"]
        return {
            "desirable": Mean.of(desirable_B, real_B),
            "desirable_log_ratio": Mean.of(values_B, real_B & desirable_B),
            "undesirable_log_ratio": Mean.of(values_B, real_B & ~desirable_B),
        }
