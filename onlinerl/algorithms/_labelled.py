"""What losses of single responses share that are desirable or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.items import judged_sequences, sample_items
from onlinerl.ops.likelihood import with_nll
from onlinerl.ops.preference import log_ratios
from onlinerl.ops.whole_step import Rows, WholeStep
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Labelled(WholeStep):
    """Mean over responses of w_d loss(beta (D - z)) if desirable, w_u loss(-beta (D - z)) if not; z is of the whole step.

    D is the log-ratio of policy to reference of a whole response, in nats. A subclass is `shift`, which is beta z, and `labelled_loss`.
    """

    unit = "sequence"
    reference = "fixed"

    beta: float = Field(0.1, gt=0)
    desirable_weight: float = Field(1.0, ge=0)
    undesirable_weight: float = Field(1.0, ge=0)
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob per token of desirable responses."""
    response_weights: Literal["equal", "wpo"] = "equal"
    """What a response counts: as much as any other, or by how close it is to what the policy would say now (see `row_closeness`)."""
    threshold: float | None = None
    """Responses with this score or a higher one are desirable. None: those that win more than half of their comparisons within the group;
    those that win less are undesirable, and the others are left out."""

    metrics: ClassVar[tuple[Reported, ...]] = (
        Reported("desirable", "Share of desirable responses", "ratio"),
        Reported("desirable_log_ratio", "log(policy / reference) of desirable responses", "nats/sequence"),
        Reported("undesirable_log_ratio", "log(policy / reference) of the others", "nats/sequence"),
    )

    @by_knobs
    def needs(self) -> Needs:
        """Without a threshold, responses to compare with."""
        compares = self.threshold is None
        plain = Needs(reference=True, min_samples=2 if compares else 1, preferences=compares, off_policy="valid")
        return replace(plain, collision=self.response_weights == "wpo")

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """That of D = z = 0, whatever the label."""
        equal = self.desirable_weight == self.undesirable_weight and self.response_weights == "equal"
        return self.desirable_weight * self.labelled_loss(torch.zeros(1)).item() if equal and not self.nll_coef else None

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself, but for those that are neither."""
        sequences, dropped = judged_sequences(judged, at_least=self.needs.min_samples)
        labelled = [s for s in sequences if self.threshold is not None or s.win_rate != 0.5]
        dropped["tie"] += len(sequences) - len(labelled)
        return sample_items(judged, labelled), +dropped

    def shift(self, rows: Rows) -> Tensor | float:
        """beta z of the step; carries no gradient."""
        raise NotImplementedError

    def labelled_loss(self, z_N: Tensor) -> Tensor:
        """The loss of a response, of beta (D - z), or of minus that if it is undesirable."""
        raise NotImplementedError

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """D."""
        return log_ratios(outputs, batch)

    def facts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Which ones are desirable."""
        return {"desirable": batch.win_rates_B > 0.5 if self.threshold is None else batch.scores_B >= self.threshold}

    def row_weights(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Times how close it is, if that is asked for."""
        if self.response_weights == "equal":
            return batch.weight_B
        from onlinerl.ops.terms import row_closeness  # not with the class: few ask for it

        return batch.weight_B * row_closeness(outputs, batch)

    def step_loss(self, rows: Rows) -> Tensor:
        """Of all responses of the step."""
        desirable_N = rows.facts["desirable"] > 0
        signs_N = torch.where(desirable_N, 1.0, -1.0)
        weights_N = torch.where(desirable_N, self.desirable_weight, self.undesirable_weight) * rows.weight_N
        return (weights_N * self.labelled_loss(signs_N * (self.beta * rows.values_N - self.shift(rows)))).sum()

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the likelihood of desirable responses; see `WholeStep.loss` for what it raises."""
        rows_N = self.facts(batch)["desirable"].nonzero()[:, 0]
        weight_N = self.row_weights(outputs, batch)[rows_N]
        return with_nll(super().loss(outputs, batch), outputs, batch, self.nll_coef, rows_N, weight_N)

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """By class."""
        real_B, desirable_B = batch.weight_B > 0, self.facts(batch)["desirable"]
        return {
            "desirable": Mean.of(desirable_B, real_B),
            "desirable_log_ratio": Mean.of(values_B, real_B & desirable_B),
            "undesirable_log_ratio": Mean.of(values_B, real_B & ~desirable_B),
        }
