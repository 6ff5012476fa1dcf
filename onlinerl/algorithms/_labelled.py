"""What losses of single responses share that are desirable or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.items import judged_sequences, sample_items
from onlinerl.ops.likelihood import with_nll
from onlinerl.ops.preference import log_ratios
from onlinerl.ops.whole_step import Rows, WholeStep
from onlinerl.protocols.algorithm import Needs, Reported, by_knobs
from onlinerl.types.training import TrainItem

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


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
        return Needs(reference=True, min_samples=2 if compares else 1, preferences=compares, off_policy="valid")

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """That of D = z = 0, whatever the label."""
        equal = self.desirable_weight == self.undesirable_weight
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

    def step_loss(self, rows: Rows) -> Tensor:
        """Of all responses of the step."""
        desirable_N = rows.facts["desirable"] > 0
        signs_N = torch.where(desirable_N, 1.0, -1.0)
        weights_N = torch.where(desirable_N, self.desirable_weight, self.undesirable_weight) * rows.weight_N
        return (weights_N * self.labelled_loss(signs_N * (self.beta * rows.values_N - self.shift(rows)))).sum()

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the likelihood of desirable responses; see `WholeStep.loss` for what it raises."""
        rows_N = self.facts(batch)["desirable"].nonzero()[:, 0]
        return with_nll(super().loss(outputs, batch), outputs, batch, self.nll_coef, rows_N, batch.weight_B[rows_N])

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """By class."""
        real_B, desirable_B = batch.weight_B > 0, self.facts(batch)["desirable"]
        return {
            "desirable": Mean.of(desirable_B, real_B),
            "desirable_log_ratio": Mean.of(values_B, real_B & desirable_B),
            "undesirable_log_ratio": Mean.of(values_B, real_B & ~desirable_B),
        }
