"""A score for each response: the Bradley-Terry reward model."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.loss import LossOutput
from onlinerl.objectives._comparisons import Comparisons
from onlinerl.ops.preference import by_pair
from onlinerl.preference_models import BRADLEY_TERRY, RewardHead


class BradleyTerry(Comparisons):
    """z = r_w - r_l, r a score read at the last token. Preferences of such a model never go in a circle.

    "Training language models to follow instructions with human feedback" (arXiv 2203.02155), equation 1; the centering term is that of
    "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking" (arXiv 2312.09244), section 2.
    """

    oracle: ClassVar[str | None] = "reward_model"

    center_rewards_coefficient: float = Field(0.01, ge=0)
    """Weight of (r_w + r_l)^2, which brings scores near 0 and asks nothing of their differences; 0 leaves it out."""

    @property
    def head(self) -> RewardHead:
        """One number."""
        return RewardHead(outputs=1, description={"objective": BRADLEY_TERRY})

    def odds(self, outputs: Outputs, batch: Batch) -> tuple[Tensor]:
        """[P]."""
        chosen, rejected = by_pair(outputs.need("rewards_BD")[:, 0], batch)
        return (chosen - rejected,)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the centering term."""
        loss = super().loss(outputs, batch)
        chosen, rejected = by_pair(outputs.need("rewards_BD")[:, 0], batch)
        centering = (batch.weight_P * (chosen + rejected) ** 2).sum()
        return LossOutput(total=loss.total + self.center_rewards_coefficient * centering, metrics=loss.metrics)

    def log_odds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The difference of the scores."""
        odds: np.ndarray = np.asarray(first[:, 0], dtype=np.float64) - second[:, 0]
        return odds
