"""Both responses read together: the pairwise preference model."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.objectives._comparisons import Comparisons
from onlinerl.ops.preference import by_pair
from onlinerl.preference_models import PAIRWISE, RewardHead, compared
from onlinerl.types.prompts import RawPrompt


class Pairwise(Comparisons):
    """z = the logit that the response shown first wins; each comparison is trained in both orders, and counts once. Preferences may go in
    circles, and K responses take K (K - 1) forward passes.

    "LLM-Blender: Ensembling Large Language Models with Pairwise Ranking and Generative Fusion" (arXiv 2306.02561), section 3.2.
    """

    oracle: ClassVar[str | None] = "pair_model"
    compares: ClassVar[bool] = True

    @property
    def head(self) -> RewardHead:
        """One number."""
        return RewardHead(outputs=1, description={"objective": PAIRWISE})

    def encode(self, tokenizer: Any, prompt: RawPrompt, first: str, second: str, model: str) -> tuple[list[int], list[int]]:
        """Both orders."""
        return compared(tokenizer, prompt, first, second, model), compared(tokenizer, prompt, second, first, model)

    def odds(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """[P] of each order, both from the side of the chosen response."""
        shown_first, shown_second = by_pair(outputs.need("rewards_BD")[:, 0], batch)
        return shown_first, -shown_second

    def log_odds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Half the difference of the two orders, in which nothing is left of what the place adds."""
        odds: np.ndarray = (np.asarray(first[:, 0], dtype=np.float64) - second[:, 0]) / 2
        return odds
