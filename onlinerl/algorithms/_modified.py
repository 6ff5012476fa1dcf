"""What may go with most losses on pairs: a filter of pairs, and a KL that is measured on samples of the policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.protocols.algorithm import by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import LossOutput
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem


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


class Modified(Pairwise):
    """Pairs pass `pair_filter`, and `online_kl` times an estimate of KL(policy || reference) comes on top.

    That estimate is the mean over some samples of sg[D - b] D, see `ops.online_kl`: HyPO, "The Importance of Online Data:
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
        return replace(plain, ches=self.pair_filter.ches_share > 0, off_policy=stale)

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """The pairs that pass by their scores, with samples of the policy if a KL has a price."""
        from onlinerl.ops import pair_filters
        from onlinerl.ops.pairs import pair_items

        made, dropped = pair_items(judged, pairs)
        kept, failed = pair_filters.by_scores(made, self.pair_filter.margin, self.pair_filter.floor)
        kept, others = self.augmented(judged, kept)
        kept = self.completed(judged, kept)
        if self.online_kl:
            kept = pair_filters.with_samples(kept, judged, self.online_kl_samples)
        return kept, dropped + others + failed

    def augmented(self, judged: Judged, items: Sequence[TrainItem]) -> tuple[list[TrainItem], Counter[str]]:
        """What becomes of the pairs of a group that have passed, and how many more are left out for which reason."""
        return list(items), Counter()

    def select(self, items: Sequence[TrainItem]) -> tuple[Sequence[int], Mapping[str, int]]:
        """The pairs that pass by what the learner says of them."""
        kept, dropped = super().select(items)
        most, share = self.pair_filter.max_reference_margin, self.pair_filter.ches_share
        if most is None and not share:
            return kept, dropped
        from onlinerl.ops.pair_filters import by_learner

        kept, failed = by_learner(items, kept, most, share, normalized=self.pair_filter.ches_normalized)
        return kept, {**dropped, **failed}

    def with_terms(self, loss: LossOutput, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the price of the KL too."""
        loss = super().with_terms(loss, outputs, batch)
        if not self.online_kl:
            return loss
        from onlinerl.ops.online_kl import of_pairs

        return of_pairs(loss, outputs, batch, self.online_kl)
