"""What losses on pairs share: the pairs of the configured builder, their weights, and the likelihood of the chosen response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.pairs import pair_items
from onlinerl.ops.preference import by_pair, closeness, pair_metrics, sequence_logprobs
from onlinerl.protocols.algorithm import Algorithm, Needs, OffPolicy, Reference, by_knobs
from onlinerl.types.training import TrainItem

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class Pairwise(Algorithm):
    """Mean over pairs of weight * (`pair_loss` + nll_coef * NLL(chosen)). An item is a pair, the chosen response first."""

    unit = "pair"

    pair_weights: Literal["equal", "score_gap", "certainty", "wpo"] = "equal"
    """What a pair counts: as much as any other, the gap between its scores, 2 P(chosen beats rejected) - 1 (these two are divided by their
    mean over the iteration), or how close both responses are to what the policy would say now (see `closeness`)."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob of the chosen response: "Iterative Reasoning Preference Optimization", equation 1."""
    nll_norm: Literal["per_token", "sum"] = "per_token"
    """Mean or sum over its tokens. The sum is that of "Provably Mitigating Overoptimization in RLHF", whose weights are far smaller."""

    @by_knobs
    def needs(self) -> Needs:
        """Pairs and a reference; probabilities if they are weights.

        A preference holds whoever wrote the two, but where the reference is the previous iterate, they are meant to be its responses.
        """
        off_policy: OffPolicy = "approximate" if self.reference == "previous" else "valid"
        certainty = self.pair_weights == "certainty"
        collision = self.pair_weights == "wpo"
        return Needs(
            pairs=True, reference=True, min_samples=2, off_policy=off_policy, preferences=certainty, collision=collision
        )

    @by_knobs
    def reference(self) -> Reference:
        """The base model."""
        return "fixed"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs, without those of identical or unjudged responses."""
        return pair_items(judged, pairs)

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """The pairs with their weights, whose mean is 1; those of `wpo` are the policy's of the moment, and come in the loss."""
        if self.pair_weights in ("equal", "wpo"):
            return items
        total = sum(map(self._weight, items))
        scale = len(items) / total if total > 0 else 0.0
        return (replace(item, weight=self._weight(item) * scale) for item in items)

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """Loss and margin z of each pair, [P] each, and metrics of its own."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs.

        Raises:
            ValueError: if something is missing that it needs.
        """
        loss_P, z_P, metrics = self.pair_loss(outputs, batch)
        metrics = (
            pair_metrics(outputs, batch, z_P, reference=self.needs.reference_logprobs)
            | {"preference_loss": Mean.of(loss_P)}
            | metrics
        )
        weight_P, weighed = self._weights(outputs, batch)
        loss = LossOutput(total=(loss_P * weight_P).sum(), metrics=metrics | weighed)
        return self.with_terms(loss, outputs, batch)

    def with_terms(self, loss: LossOutput, outputs: Outputs, batch: Batch) -> LossOutput:
        """With weight * nll_coef * NLL(chosen) of each pair."""
        if not self.nll_coef:
            return loss
        nll_B = -sequence_logprobs(outputs, batch)
        mean_P, _ = by_pair(nll_B / lengths(batch), batch)
        nll_P = self.nll_coef * (mean_P if self.nll_norm == "per_token" else by_pair(nll_B, batch)[0])
        metrics = loss.metrics | {"chosen_nll": Mean.of(mean_P)}
        return LossOutput(total=loss.total + (nll_P * self._weights(outputs, batch)[0]).sum(), metrics=metrics)

    def _weights(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Mean]]:
        """Of each pair, [P], and what is reported about them."""
        if self.pair_weights != "wpo":
            return batch.weight_P, {}
        close_P = closeness(outputs, batch)
        return batch.weight_P * close_P, {"pair_weight": Mean.of(close_P)}

    def unless_modified(self, loss: float) -> float | None:
        """What the loss is where policy and reference agree; None if weights or the likelihood of the chosen response change it."""
        return loss if self.pair_weights == "equal" and not self.nll_coef else None

    def _weight(self, item: TrainItem) -> float:
        chosen, rejected = item.sequences[:2]
        return max(0.0, chosen.score - rejected.score if self.pair_weights == "score_gap" else 2 * item.prob - 1)
