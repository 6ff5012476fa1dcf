"""AOT: "Distributional Preference Alignment of LLMs via Optimal Transport"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.ops.likelihood import with_nll
from onlinerl.ops.logprobs import masked
from onlinerl.ops.margins import logistic, margin
from onlinerl.ops.pairs import pair_items
from onlinerl.ops.preference import pair_metrics, sequence_logprobs
from onlinerl.ops.whole_step import Rows, WholeStep
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import LossOutput, Mean
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Aot(WholeStep):
    """Mean over pairs of f(beta delta), delta = sort(S_w - S_l) - sort(S_ref_w - S_ref_l), sorted over the whole optimizer step.

    The policy's margins are to dominate the reference's as distributions, not pair by pair. `training.batch_size` is part of the method.
    """

    unit = "pair"
    weighable = False  # a pair has no place of its own once both sides are sorted
    needs = Needs(pairs=True, reference=True, min_samples=2, off_policy="valid")
    reference = "fixed"

    beta: float = Field(0.01, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels assumed to be wrong."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob per token of the chosen response."""

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """log 2, unless the likelihood is added."""
        return None if self.nll_coef else math.log(2)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs, without those of identical or unjudged responses."""
        return pair_items(judged, pairs)

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """S."""
        return sequence_logprobs(outputs, batch)

    def facts(self, batch: Batch) -> Mapping[str, Tensor]:
        """The reference's S."""
        return {"reference": masked(batch.need("reference_logprobs_BT"), batch.mask_BT).sum(dim=1)}

    def differences(self, rows: Rows) -> Tensor:
        """delta[P]; pairs of weight 0 are left out."""
        chosen, rejected = kept_pairs(rows)
        ours_N, theirs_N = rows.values_N, rows.facts["reference"]
        return (ours_N[chosen] - ours_N[rejected]).sort().values - (theirs_N[chosen] - theirs_N[rejected]).sort().values

    def step_loss(self, rows: Rows) -> Tensor:
        """Of all pairs of the step."""
        return logistic(self.beta * self.differences(rows), 1.0 - self.label_smoothing).sum()

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the likelihood of chosen responses; see `WholeStep.loss` for what it raises."""
        return with_nll(super().loss(outputs, batch), outputs, batch, self.nll_coef, batch.pairs_P2[:, 0], batch.weight_P)

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """Pair by pair, as of any loss on pairs."""
        return pair_metrics(outputs, batch, self.beta * margin(outputs, batch))


def kept_pairs(rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows of the chosen and of the rejected responses of pairs that count."""
    pairs_P2 = rows.pairs_P2[rows.weight_N[rows.pairs_P2[:, 0]] > 0]
    return pairs_P2[:, 0], pairs_P2[:, 1]
