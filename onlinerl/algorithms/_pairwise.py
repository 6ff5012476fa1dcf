"""What losses on pairs share: the pairs of the configured builder, their weights, and the likelihood of the chosen response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.preference import pair_metrics
from onlinerl.protocols.algorithm import Algorithm, by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.protocols.algorithm import Reference
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


class Pairwise(Algorithm):
    """Mean over pairs of weight * (`pair_loss` + nll_coef * NLL(`nll_target`)). An item is a pair, the chosen response first."""

    unit = "pair"
    reference: ClassVar[Reference] = "fixed"
    weighable = False

    pair_weights: Literal["equal", "score_gap", "certainty", "strength", "dcg", "per_prompt", "age", "source", "wpo"] = "equal"
    """What a pair counts: as much as any other, the gap between its scores, 2 P(chosen beats rejected) - 1, the class of its score gap (see
    `strength_thresholds`), what swapping the two changes in the group's DCG (see `with_dcg`), as much as the other pairs of its prompt
    together do for theirs, the less the older it is (`pair_age_decay`), by who wrote the two (`source_weights`), all of these divided by their
    mean over the iteration; or how close both responses are to what the policy would say now (see `closeness`)."""
    strength_thresholds: list[float] = Field([])
    """Score gaps at which a pair comes into the next class, ascending; pairs of the lowest class count 1, those of the next one 2, ...: the
    scaled loss of "HelpSteer2-Preference: Complementing Ratings with Preferences"."""
    pair_age_decay: float = Field(0.5, gt=0, le=1)
    """A pair that is older by an iteration counts so many times as much."""
    source_weights: dict[str, float] = Field({})
    """What a response counts by where it is from (`Rollout.source`: `policy`, `teacher`, ...), and `replay` a pair of an earlier iteration; what
    is not named counts 1. A pair counts the product."""
    pair_weight_clip: list[float] | None = None
    """The lowest and the highest weight of a pair, in units of the mean weight."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob of the chosen response: "Iterative Reasoning Preference Optimization", equation 1."""
    nll_target: Literal["chosen", "reference_answer"] = "chosen"
    """Or that of the stored answer to the prompt, whoever won."""
    nll_norm: Literal["per_token", "batch_tokens", "sum"] = "per_token"
    """Mean over its tokens, or over those of all targets of the iteration (see `pooled`), or their sum: that of "Provably Mitigating
    Overoptimization in RLHF", whose weights are far smaller."""

    @by_knobs
    def needs(self) -> Needs:
        """Pairs and a reference; probabilities if they are weights.

        A preference holds whoever wrote the two, but where the reference is the previous iterate, they are meant to be its responses.
        """
        from onlinerl.protocols.needs import Needs  # not with the class: it is asked for later

        ranked, close = self.pair_weights in ("certainty", "dcg"), self.pair_weights == "wpo"
        plain = Needs(pairs=True, reference=True, min_samples=2, preferences=ranked, collision=close)
        stale = self.reference == "previous"
        return replace(plain, answers=self.nll_target != "chosen", off_policy="approximate" if stale else "valid")

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs, without those of identical or unjudged responses."""
        from onlinerl.ops.pairs import pair_items

        made, dropped = pair_items(judged, pairs)
        return self.completed(judged, made), dropped

    def completed(self, judged: Judged, items: list[TrainItem]) -> list[TrainItem]:
        """The pairs of a group with what only the group says: their place in its ranking, and the answer that is imitated beside them."""
        from onlinerl.ops import pair_modifiers  # not with the class: few ask for any

        if self.pair_weights == "dcg":
            items = pair_modifiers.with_dcg(items, judged)
        return items if self.nll_target == "chosen" else [pair_modifiers.with_answer(item, judged) for item in items]

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """The pairs with their weights, whose mean is 1; those of `wpo` are the policy's of the moment, and come in the loss."""
        pools = self.nll_coef > 0 and self.nll_norm == "batch_tokens"
        weighs = self.pair_weights not in ("equal", "wpo")
        if not weighs and not pools:
            return items
        from onlinerl.ops import pair_modifiers

        weighed = pair_modifiers.weighed_pairs(items, self.raw_weights(items), self.pair_weight_clip) if weighs else items
        return pair_modifiers.pooled(items, weighed) if pools else weighed

    def raw_weights(self, items: Sequence[TrainItem]) -> Iterable[float]:
        """What pairs count by `pair_weights`, not yet divided by its mean."""
        from onlinerl.ops import pair_modifiers

        strength, decay = self.strength_thresholds, self.pair_age_decay
        return pair_modifiers.raw_weights(items, self.pair_weights, strength, decay, self.source_weights)

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """Loss and margin z of each pair, [P] each, and metrics of its own."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs.

        Raises:
            ValueError: if something is missing that it needs.
        """
        loss_P, z_P, metrics = self.pair_loss(outputs, batch)
        weight_P, weighed = self._weights(outputs, batch)
        common = pair_metrics(outputs, batch, z_P, reference=self.needs.reference_logprobs)
        metrics = common | {"preference_loss": Mean.of(loss_P)} | metrics | weighed
        return self.with_terms(LossOutput(total=(loss_P * weight_P).sum(), metrics=metrics), outputs, batch)

    def with_terms(self, loss: LossOutput, outputs: Outputs, batch: Batch) -> LossOutput:
        """With weight * nll_coef * NLL(target) of each pair."""
        if not self.nll_coef:
            return loss
        from onlinerl.ops.likelihood import with_pair_nll

        weight_P, of_chosen = self._weights(outputs, batch)[0], self.nll_target == "chosen"
        return with_pair_nll(loss, outputs, batch, self.nll_coef, weight_P, self.nll_norm, of_chosen=of_chosen)

    def _weights(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Mean]]:
        """Of each pair, [P], and what is reported about them."""
        if self.pair_weights != "wpo":
            return batch.weight_P, {}
        from onlinerl.ops.terms import closeness

        close_P = closeness(outputs, batch)
        return batch.weight_P * close_P, {"pair_weight": Mean.of(close_P)}

    def unless_modified(self, loss: float) -> float | None:
        """What the loss is where policy and reference agree; None if weights or the likelihood of the chosen response change it."""
        return loss if self.pair_weights == "equal" and not self.nll_coef else None
