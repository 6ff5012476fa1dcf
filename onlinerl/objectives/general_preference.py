"""An embedding for each response, whose antisymmetric product says who wins: the general preference model."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.objectives._comparisons import Comparisons
from onlinerl.ops.antisymmetric import antisymmetric
from onlinerl.preference_models import GENERAL, RewardHead


class GeneralPreference(Comparisons):
    """z = S / tau, S = (R v_w) . v_l, v [dim] read at the last token and R block-diagonal of [[0, -1], [1, 0]]: preferences may go in circles,
    and K responses take K forward passes. Bradley-Terry is the case of two dimensions of which one is constant.

    "General Preference Modeling with Preference Representations for Aligning Language Models" (arXiv 2410.02197), section 4. Margins
    (`loss_type: margin`) are in the units of S. The embeddings are not normalised: their length says how strong a preference is.
    """

    oracle: ClassVar[str | None] = "gpm"

    dim: int = Field(6, ge=2)
    """Length of an embedding; even."""
    tau: float | None = Field(None, gt=0)
    """How much of S is odds of e to 1. By default 1 with two dimensions, else 0.1, as in the paper's code."""

    @field_validator("dim")
    @classmethod
    def _even(cls, dim: int) -> int:
        if dim % 2:
            raise ValueError("an embedding is made of pairs of numbers, so its length is even")
        return dim

    @property
    def temperature(self) -> float:
        """`tau`, or its default."""
        return self.tau if self.tau is not None else (1.0 if self.dim == 2 else 0.1)

    @property
    def unit_of_odds(self) -> float:
        """Margins are in the units of S."""
        return self.temperature

    @property
    def head(self) -> RewardHead:
        """The embedding."""
        return RewardHead(outputs=self.dim, description={"objective": GENERAL, "tau": self.temperature})

    def odds(self, outputs: Outputs, batch: Batch) -> tuple[Tensor]:
        """[P]."""
        embeddings_BD, (chosen, rejected) = outputs.need("rewards_BD"), batch.pairs_P2.unbind(dim=1)
        return (antisymmetric(embeddings_BD[chosen], embeddings_BD[rejected]) / self.temperature,)

    def log_odds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """S / tau."""
        a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
        product: np.ndarray = (a[:, 0::2] * b[:, 1::2] - a[:, 1::2] * b[:, 0::2]).sum(axis=1)
        return product / self.temperature
