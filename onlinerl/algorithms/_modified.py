"""What may go with most losses on pairs: a filter of pairs, and a KL that is measured on samples of the policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.items import need, train_sequences
from onlinerl.ops.pairs import pair_items
from onlinerl.ops.preference import log_ratios, online_kl
from onlinerl.protocols.algorithm import Needs, by_knobs
from onlinerl.types.training import TrainItem, TrainSequence

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class PairFilter(BaseModel):
    """Which pairs are left out before the loss; by default none is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    margin: float | None = Field(None, ge=0)
    """Smallest gap between the two scores, in units of the oracle's score (win rates, if it gives none); `gap` counts the others."""
    floor: float | None = None
    """Lowest score of the chosen response, in the same units; `floor` counts the others."""
    max_reference_margin: float | None = None
    """Largest c = log-prob of the rejected minus that of the chosen response under the reference, in nats: how far the loss must move a pair
    before the policy prefers the right one ("Preference Learning Algorithms Do Not Learn Preference Rankings"). `reference_margin` counts
    the others."""
    ches_share: float = Field(0.0, ge=0, lt=1)
    """Share of the pairs of an iteration, those with the highest CHES, the sum over hidden states of the one response times that of the other,
    minus the former squared: such pairs lower the chosen response too ("Unintentional Unalignment: Likelihood Displacement in Direct
    Preference Optimization"). `ches` counts them. The paper leaves out 0.05 and more."""
    ches_normalized: bool = True
    """Means over a response in the place of sums."""

    def rejects(self, winner: TrainSequence, loser: TrainSequence) -> str | None:
        """Why a pair does not pass by its scores; None if it does."""
        if self.margin is not None and winner.score - loser.score < self.margin:
            return "gap"
        return "floor" if self.floor is not None and winner.score < self.floor else None

    def improbable(self, item: TrainItem) -> bool:
        """Whether the reference prefers the rejected response by too much."""
        if self.max_reference_margin is None:
            return False
        chosen, rejected = (need(s, "reference_logprobs").sum() for s in item.sequences[:2])
        return bool(rejected - chosen > self.max_reference_margin)


class Modified(Pairwise):
    """Pairs pass `pair_filter`, and `online_kl` times an estimate of KL(policy || reference) comes on top.

    That estimate is the mean over some samples of sg[D - b] D, see `ops.preference.online_kl`: HyPO, "The Importance of Online Data:
    Understanding Preference Fine-tuning via Coverage". They are samples of the policy that the iteration was sampled from, so keep the
    optimizer steps of an iteration few.
    """

    pair_filter: PairFilter = PairFilter()
    """Which pairs are left out before the loss: by their scores, by what the reference prefers, by how alike their hidden states are."""
    online_kl: float = Field(0.0, ge=0)
    """Price of one nat of KL; the paper's lie between 1e-4 and 1e-2."""
    online_kl_samples: int = Field(2, ge=1)
    """The first so many judged responses of a group measure it, with each of its pairs; the paper has 2."""

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss, with CHES if they are filtered by it; samples of an older policy measure another KL."""
        plain = super().needs
        stale = "approximate" if self.online_kl and plain.off_policy == "valid" else plain.off_policy
        return plain.model_copy(update={"ches": self.pair_filter.ches_share > 0, "off_policy": stale})

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs that pass by their scores, with samples of the policy if a KL has a price."""
        made, dropped = pair_items(judged, pairs)
        reasons = [self.pair_filter.rejects(*item.sequences[:2]) for item in made]
        kept = [item for item, reason in zip(made, reasons, strict=True) if reason is None]
        kept, others = self.augmented(judged, kept)
        kept = self.completed(judged, kept)
        if self.online_kl and kept:
            samples = [s for s in train_sequences(judged).values() if s.source == "policy"][: self.online_kl_samples]
            kept = [_with_samples(item, samples) for item in kept]
        return kept, dropped + others + Counter(reason for reason in reasons if reason is not None)

    def augmented(self, judged: Judged, items: Sequence[TrainItem]) -> tuple[list[TrainItem], Counter[str]]:
        """What becomes of the pairs of a group that have passed, and how many more are left out for which reason."""
        return list(items), Counter()

    def select(self, items: Sequence[TrainItem]) -> tuple[Sequence[int], Mapping[str, int]]:
        """The pairs that pass by what the learner says of them."""
        kept, dropped = super().select(items)
        passing = self.pair_filter
        if passing.max_reference_margin is not None:
            probable = [place for place in kept if not passing.improbable(items[place])]
            dropped, kept = {**dropped, "reference_margin": len(kept) - len(probable)}, probable
        left_out = int(passing.ches_share * len(kept))
        if left_out:
            scores = np.array([need(items[place].sequences[0], "ches")[int(passing.ches_normalized)] for place in kept])
            highest = set(np.argsort(-scores, kind="stable")[:left_out].tolist())
            dropped, kept = {**dropped, "ches": left_out}, [place for n, place in enumerate(kept) if n not in highest]
        return kept, dropped

    def with_terms(self, loss: LossOutput, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the price of the KL too."""
        loss = super().with_terms(loss, outputs, batch)
        if not self.online_kl:
            return loss
        ratios_B = log_ratios(outputs, batch)
        rows_PN = batch.online_PN if batch.online_PN is not None else batch.pairs_P2[:, :0]
        ratios_PN, valid_PN = ratios_B[rows_PN.clamp(min=0)], rows_PN >= 0
        kl_P: Tensor = self.online_kl * online_kl(ratios_PN, valid_PN)
        metrics = loss.metrics | {"online_kl": Mean.of(ratios_PN, valid_PN)}
        return LossOutput(total=loss.total + (kl_P * batch.weight_P).sum(), metrics=metrics)


def _with_samples(item: TrainItem, samples: Sequence[TrainSequence]) -> TrainItem:
    """With places of the samples among the sequences, where those come last that have other tokens than the pair."""
    sequences = list(item.sequences)
    places = []
    for sample in samples:
        same = (place for place, s in enumerate(sequences) if _alike(s, sample))
        place = next(same, len(sequences))
        if place == len(sequences):
            sequences.append(sample)
        places.append(place)
    return replace(item, sequences=tuple(sequences), online=tuple(places))


def _alike(one: TrainSequence, other: TrainSequence) -> bool:
    """Whether their tokens are the same, those of the prompt too."""
    return one.prompt_ids == other.prompt_ids and tuple(one.response_ids) == tuple(other.response_ids)
