"""Losses of how a response fares against the others of its group, which bring its log-ratio to a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.items import judged_sequences, sample_items, train_sequences
from onlinerl.ops.preference import log_ratios, pair_metrics
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, TrainSequence


class SelfPlay(Algorithm):
    """Mean over responses of (D - scale * standing)^2. A subclass says what a standing is: 0 for one that is as good as the others.

    Targets are hundreds of nats and never reached, so the optimizer's normalisation and gradient clipping shape the method: watch the
    log-ratios, not the loss.
    """

    unit = "sequence"
    needs = Needs(reference=True, preferences=True, min_samples=2, off_policy="approximate")
    reference = "previous"  # a standing is against responses of the policy at the iteration's start

    pairs: Literal["best_worst", "all"] = "best_worst"
    """Which responses of a group are trained: those with the highest and the lowest standing, or all K."""

    metrics: ClassVar[tuple[Reported, ...]] = (
        Reported("winner_log_ratio", "log(policy / reference) of responses better than their group", "nats/sequence"),
        Reported("loser_log_ratio", "log(policy / reference) of responses worse than their group", "nats/sequence"),
        Reported("target", "How far log-ratios are asked to move, up or down", "nats/sequence"),
    )

    @property
    def scale(self) -> float:
        """Nats per unit of standing."""
        raise NotImplementedError

    def standings(self, judged: Judged) -> np.ndarray:
        """f64[K]: by how much each response is preferred to the others; NaN for one that was not judged."""
        raise NotImplementedError

    def with_standing(self, sequence: TrainSequence, standing: float) -> TrainSequence:
        """The response with its standing, if it does not carry it already."""
        return sequence

    def standings_of(self, batch: Batch) -> Tensor:
        """Those of the rows of a batch, [B]."""
        raise NotImplementedError

    def most_items(self, samples: int, pairs: int) -> int:
        """`best_worst` makes one item of the two."""
        return 1 if self.pairs == "best_worst" else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Best and worst of the judged responses as one item, or each judged response by itself."""
        from onlinerl.types.training import TrainItem

        sequences, dropped = judged_sequences(judged, at_least=2)
        if not sequences:
            return [], dropped
        standings = self.standings(judged)
        by_index = {index: self.with_standing(s, standings[index]) for index, s in train_sequences(judged).items()}
        if self.pairs == "all":
            return sample_items(judged, by_index.values()), dropped
        order = sorted(by_index, key=lambda index: -standings[index])  # stable
        best, worst = by_index[order[0]], by_index[order[-1]]
        if best.response_ids == worst.response_ids:  # two targets for one response
            return [], dropped + Counter(identical=1)
        # NaN if the two were never compared with each other; the loss reads standings only.
        prob = float(judged.verdict.matrix()[order[0], order[-1]])
        # Both in one item: what their gradients have in common cancels only if they are in the same step.
        return [TrainItem(prompt_id=judged.group.prompt.id, sequences=(best, worst), prob=prob)], dropped

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over responses.

        Raises:
            ValueError: if reference log-probs or standings are missing.
        """
        ratios_B = log_ratios(outputs, batch)
        targets_B = self.scale * self.standings_of(batch)
        loss_B = (ratios_B - targets_B).square()
        real_B = batch.lengths_B > 0
        metrics = {
            "winner_log_ratio": Mean.of(ratios_B, real_B & (targets_B > 0)),
            "loser_log_ratio": Mean.of(ratios_B, real_B & (targets_B < 0)),
            "target": Mean.of(targets_B.abs(), real_B),
        }
        if self.pairs == "best_worst":
            chosen, rejected = batch.pairs_P2.unbind(dim=1)
            metrics |= pair_metrics(outputs, batch, (ratios_B[chosen] - ratios_B[rejected]) / self.scale)
        return LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
