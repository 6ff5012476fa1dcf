"""SPPO: "Self-Play Preference Optimization for Language Model Alignment"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._self_play import SelfPlay

if TYPE_CHECKING:
    from onlinerl.batch import Batch
    from onlinerl.types.labels import Judged
    from onlinerl.types.training import TrainSequence


class Sppo(SelfPlay):
    """Mean over responses of (D - eta (win rate - 1/2))^2 (equation 4.7, partition term fixed at eta / 2).

    Targets are hundreds of nats and never reached: watch the log-ratios, not the loss.
    """

    eta: float = Field(1000.0, gt=0)
    """Nats per unit of win rate; 1 / eta is the `beta` of the published configurations."""
    winrate_includes_self: bool = True
    """Whether a response is one of its own opponents, as in the paper: it draws against itself, so of K no win rate is above 1 - 1 / (2 K)."""

    @property
    def scale(self) -> float:
        """Nats per unit of win rate."""
        return self.eta

    def standings(self, judged: Judged) -> np.ndarray:
        """Win rates, centred."""
        centred = judged.verdict.win_rates() - 0.5
        if self.winrate_includes_self:
            return centred
        known = (~np.isnan(judged.verdict.matrix())).sum(axis=1)
        without: np.ndarray = centred * known / np.maximum(known - 1, 1)  # itself adds nothing but to the count
        return without

    def with_standing(self, sequence: TrainSequence, standing: float) -> TrainSequence:
        """The win rate that it is trained with."""
        return sequence if self.winrate_includes_self else sequence.with_(win_rate=0.5 + float(standing))

    def standings_of(self, batch: Batch) -> Tensor:
        """Every response carries its win rate."""
        return batch.win_rates_B - 0.5
