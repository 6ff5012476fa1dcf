"""What losses on whole lists share: all responses of a group as one item, the best first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.items import judged_sequences
from onlinerl.ops.likelihood import with_nll
from onlinerl.ops.logprobs import lengths
from onlinerl.protocols.algorithm import Algorithm, Reference, by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported
from onlinerl.types.training import TrainItem

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair


@dataclass(frozen=True)
class Lists:
    """Responses by list, the best of each first: G lists of at most K."""

    values_GK: Tensor
    """What the policy ranks them by."""
    labels_GK: Tensor
    """How good they are."""
    lengths_GK: Tensor
    valid_GK: Tensor
    """bool, false behind the end of a shorter list; whatever is there must reach neither value nor gradient."""

    @property
    def below_GKK(self) -> Tensor:
        """bool: where the second of two responses comes behind the first."""
        both_GKK = self.valid_GK[:, :, None] & self.valid_GK[:, None, :]
        return both_GKK.triu(diagonal=1)

    @property
    def worse_GKK(self) -> Tensor:
        """bool: where the second of two responses has the lower label."""
        return self.below_GKK & (self.labels_GK[:, :, None] > self.labels_GK[:, None, :])


class Listwise(Algorithm):
    """Mean over groups of `list_loss`: of what the policy ranks responses by, and of labels that say how good they are."""

    unit = "list"
    needs = Needs(reference=True, min_samples=2, off_policy="valid")

    by_win_rate: ClassVar[bool] = False
    """Whether labels are win rates within the group instead of scores."""
    keeps_repeats: ClassVar[bool] = False
    """Whether a response counts as often as it was sampled, which a ranking does not ask, but an average over the policy does."""
    metrics: ClassVar[tuple[Reported, ...]] = (
        Reported("list_size", "Responses of a list", "responses"),
        Reported("list_accuracy", "Share of the pairs in a list whose better response has the larger value", "ratio"),
    )

    @by_knobs
    def reference(self) -> Reference:
        """The base model, if it is read."""
        return "fixed" if self.needs.reference else "none"

    def most_items(self, samples: int, pairs: int) -> int:
        """One list."""
        return 1

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """All judged responses as one item, the best first; of identical ones the first counts, unless repeats are kept."""
        sequences, dropped = judged_sequences(judged, at_least=self.needs.min_samples)
        distinct = list({tuple(s.response_ids): s for s in reversed(sequences)}.values())[::-1]
        too_few = 0 < len(distinct) < self.needs.min_samples
        if too_few or not self.keeps_repeats:
            dropped["identical"] += len(sequences) - len(distinct)
            sequences = distinct
        if too_few:
            dropped["single"] += len(distinct)
            sequences = []
        ranked = sorted(sequences, key=lambda s: -(s.win_rate if self.by_win_rate else s.score))
        return [TrainItem(prompt_id=judged.group.prompt.id, sequences=tuple(ranked))] if ranked else [], +dropped

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What the loss ranks responses by, [B]."""
        raise NotImplementedError

    def list_loss(self, lists: Lists) -> Tensor:
        """The loss of each list, [G]."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over lists.

        Raises:
            ValueError: if reference log-probs are needed and missing.
        """
        rows_GK = batch.lists_GK.clamp(min=0)
        labels_B = batch.win_rates_B if self.by_win_rate else batch.scores_B
        lists = Lists(
            values_GK=self.values(outputs, batch)[rows_GK],
            labels_GK=labels_B[rows_GK],
            lengths_GK=lengths(batch)[rows_GK],
            valid_GK=batch.lists_GK >= 0,
        )
        loss_G = self.list_loss(lists)
        right_GKK = lists.values_GK[:, :, None] > lists.values_GK[:, None, :]
        metrics = {
            "list_size": Mean.of(lists.valid_GK.sum(dim=1)),
            "list_accuracy": Mean.of(right_GKK, lists.worse_GKK),
        }
        return LossOutput(total=(loss_G * batch.weight_G).sum(), metrics=metrics)


class WithLikelihood(Listwise):
    """With the likelihood of the best response on top."""

    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob of the best response."""
    nll_norm: Literal["per_token", "batch_tokens", "sum"] = "per_token"
    """Mean over its tokens, or over those of the best responses of the iteration (`pooled` in ops/pair_modifiers.py), or their sum."""

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """With the mean length of the best responses, if it is asked for."""
        if not self.nll_coef or self.nll_norm != "batch_tokens":
            return items
        from onlinerl.ops.pair_modifiers import pooled  # not with the class: few ask for it

        return pooled(items, items)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over lists.

        Raises:
            ValueError: if reference log-probs are needed and missing.
        """
        best_G, weight_G = batch.lists_GK[:, 0], batch.weight_G
        if self.nll_coef and self.nll_norm != "per_token":
            tokens_G = batch.need("nll_tokens_G") if self.nll_norm == "batch_tokens" else 1.0
            weight_G = weight_G * lengths(batch)[best_G] / tokens_G
        return with_nll(super().loss(outputs, batch), outputs, batch, self.nll_coef, best_G, weight_G)


def logsumexp_of(values_GKK: Tensor, mask_GKK: Tensor) -> Tensor:
    """log sum exp over the last axis where the mask is true, [G, K]; finite, with finite gradients, where it is nowhere true."""
    return torch.logsumexp(values_GKK.masked_fill(~mask_GKK, torch.finfo(values_GKK.dtype).min), dim=2)
