"""SPPO: "Self-Play Preference Optimization for Language Model Alignment"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.items import sample_item, train_sequences
from onlinerl.ops.logprobs import log_ratios
from onlinerl.ops.preference import pair_metrics
from onlinerl.protocols import Algorithm, Needs
from onlinerl.types import Judged, Pair, TrainItem, Unit


class Sppo(Algorithm):
    """Mean over responses of (D - eta (win rate - 1/2))^2 (equation 4.7, partition term fixed at eta / 2).

    Targets are hundreds of nats and never reached, so the optimizer's normalisation and gradient clipping shape the method: watch the
    log-ratios, not the loss.
    """

    eta: float = Field(1000.0, gt=0)
    """Nats per unit of win rate; 1 / eta is the `beta` of the published configurations."""
    train: Literal["best_worst", "all"] = "best_worst"
    """Which responses of a group are trained: those with the highest and the lowest win rate, or all K."""

    def needs(self) -> Needs:
        """The reference, a group of at least two."""
        return Needs(reference=True, min_samples=2)

    @property
    def unit(self) -> Unit:
        """Responses."""
        return "sequence"

    @property
    def default_reference(self) -> Literal["fixed", "previous", "none"]:
        """The policy at the iteration's start: win rates are against its own responses."""
        return "previous"

    def most_items(self, samples: int, pairs: int) -> int:
        """`best_worst` makes one item of the two."""
        return 1 if self.train == "best_worst" else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> list[TrainItem]:
        """Best and worst of the group as one item, or each response by itself.

        Raises:
            ValueError: for a group of fewer than two.
        """
        sequences = train_sequences(judged)
        if len(sequences) < 2:
            raise ValueError(f"sppo needs at least 2 responses per prompt, got {len(sequences)}")
        if self.train == "all":
            return [sample_item(judged, sequence) for sequence in sequences]
        order = np.argsort([-s.win_rate for s in sequences], kind="stable")
        best, worst = int(order[0]), int(order[-1])
        if sequences[best].response_ids == sequences[worst].response_ids:
            return []  # two targets for one response
        prob = float(judged.verdict.matrix()[best, worst])  # NaN if that cell was not asked; the loss reads win rates only
        # Both in one item: what their gradients have in common cancels only if they are in the same step.
        return [TrainItem(prompt_id=judged.group.prompt.id, sequences=(sequences[best], sequences[worst]), prob=prob)]

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
        if self.train == "best_worst":
            chosen, rejected = batch.pairs_P2.unbind(dim=1)
            metrics |= pair_metrics(outputs, batch, (ratios_B[chosen] - ratios_B[rejected]) / self.eta)
        return LossOutput(total=(loss_B * batch.weight_B).sum(), metrics=metrics)
