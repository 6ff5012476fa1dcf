"""SPPO: "Self-Play Preference Optimization for Language Model Alignment"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.items import judged_sequences, sample_items, train_sequences
from onlinerl.ops.preference import log_ratios, pair_metrics
from onlinerl.protocols.algorithm import Algorithm, Needs, Reported
from onlinerl.types.training import TrainItem

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


class Sppo(Algorithm):
    """Mean over responses of (D - eta (win rate - 1/2))^2 (equation 4.7, partition term fixed at eta / 2).

    Targets are hundreds of nats and never reached, so the optimizer's normalisation and gradient clipping shape the method: watch the
    log-ratios, not the loss.
    """

    unit = "sequence"
    needs = Needs(reference=True, preferences=True, min_samples=2, off_policy="approximate")
    reference = "previous"  # win rates are against responses of the policy at the iteration's start

    eta: float = Field(1000.0, gt=0)
    """Nats per unit of win rate; 1 / eta is the `beta` of the published configurations."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Which responses of a group are trained: those with the highest and the lowest win rate, or all K."""

    metrics = (
        Reported("winner_log_ratio", "log(policy / reference) of responses that win more than half", "nats/sequence"),
        Reported("loser_log_ratio", "log(policy / reference) of responses that win less than half", "nats/sequence"),
        Reported("target", "How far log-ratios are asked to move, up or down", "nats/sequence"),
    )

    def most_items(self, samples: int, pairs: int) -> int:
        """`best_worst` makes one item of the two."""
        return 1 if self.pairs == "best_worst" else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Best and worst of the judged responses as one item, or each judged response by itself."""
        sequences, dropped = judged_sequences(judged, at_least=2)
        if self.pairs == "all" or not sequences:
            return sample_items(judged, sequences), dropped
        by_index = train_sequences(judged)
        order = sorted(by_index, key=lambda index: -by_index[index].win_rate)  # stable
        best, worst = by_index[order[0]], by_index[order[-1]]
        if best.response_ids == worst.response_ids:  # two targets for one response
            return [], dropped + Counter(identical=1)
        # NaN if the two were never compared with each other; the loss reads win rates only.
        prob = float(judged.verdict.matrix()[order[0], order[-1]])
        # Both in one item: what their gradients have in common cancels only if they are in the same step.
        return [TrainItem(prompt_id=judged.group.prompt.id, sequences=(best, worst), prob=prob)], dropped

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over responses.

        Raises:
            ValueError: if reference log-probs are missing.
        """
        ratios_B = log_ratios(outputs, batch)
        targets_B = self.eta * (batch.win_rates_B - 0.5)
        loss_B = (ratios_B - targets_B).square()
        real_B = batch.lengths_B > 0
        metrics = {
            "winner_log_ratio": Mean.of(ratios_B, real_B & (targets_B > 0)),
            "loser_log_ratio": Mean.of(ratios_B, real_B & (targets_B < 0)),
            "target": Mean.of(targets_B.abs(), real_B),
        }
        if self.pairs == "best_worst":
            chosen, rejected = batch.pairs_P2.unbind(dim=1)
            metrics |= pair_metrics(outputs, batch, (ratios_B[chosen] - ratios_B[rejected]) / self.eta)
        return LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
