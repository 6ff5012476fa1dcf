"""SPPO: "Self-Play Preference Optimization for Language Model Alignment"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._self_play import SelfPlay
from onlinerl.batch import Batch

if TYPE_CHECKING:
    import numpy as np

    from onlinerl.types.labels import Judged


class Sppo(SelfPlay):
    """Mean over responses of (D - eta (win rate - 1/2))^2 (equation 4.7, partition term fixed at eta / 2).

    Targets are hundreds of nats and never reached: watch the log-ratios, not the loss.
    """

    eta: float = Field(1000.0, gt=0)
    """Nats per unit of win rate; 1 / eta is the `beta` of the published configurations."""

    @property
    def scale(self) -> float:
        """Nats per unit of win rate."""
        return self.eta

    def standings(self, judged: Judged) -> np.ndarray:
        """Win rates, centred."""
        return judged.verdict.win_rates() - 0.5

    def standings_of(self, batch: Batch) -> Tensor:
        """Every response carries its win rate."""
        return batch.win_rates_B - 0.5
