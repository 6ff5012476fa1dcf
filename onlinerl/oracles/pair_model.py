"""Preferences from a model that reads both responses at once."""

from __future__ import annotations

from itertools import permutations
from typing import ClassVar

import numpy as np

from onlinerl.oracles import _verdicts
from onlinerl.oracles._classifier import SequenceClassifier
from onlinerl.preference_models import PAIRWISE, compared
from onlinerl.types import Cost, Failure, Query, Verdict


class PairModel(SequenceClassifier):
    """Compares each pair of responses in both orders, in K (K - 1) forward passes; what the place adds cancels out.

    As PairRM, the oracle of "Self-Play Preference Optimization for Language Model Alignment" (arXiv 2405.00675): "LLM-Blender: Ensembling Large
    Language Models with Pairwise Ranking and Generative Fusion" (arXiv 2306.02561), section 3.2.
    """

    objective: ClassVar[str] = PAIRWISE
    kind: ClassVar[str] = "pairwise preference model, i.e. a sequence classifier with num_labels=1 that reads two responses"

    @property
    def compares(self) -> bool:
        """It gives no scores."""
        return True

    def _labels_problem(self, labels: int) -> str | None:
        return None if labels == 1 else "a pairwise model has one"

    def _rows(self, query: Query) -> list[list[int]]:
        """One of each pair in each order."""
        pairs = permutations(query.responses, 2)
        return [compared(self._tokenizer, query.prompt, first, second, self.path) for first, second in pairs]

    def _verdict(self, query: Query, outputs: np.ndarray, cost: Cost) -> Verdict | Failure:
        """Cell [i][j] is the logit that i wins, shown first; both orders are kept."""
        count = len(query.responses)
        odds = np.full((count, count), np.nan)
        for (i, j), said in zip(permutations(range(count), 2), outputs, strict=True):
            odds[i, j] = said[0]
        return _verdicts.from_log_odds(odds, count, annotator=self._annotator, oracle_version=self.version, cost=cost)
