"""Preferences from a general preference model: an embedding of each response, and an antisymmetric product of two of them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from onlinerl.oracles import _verdicts
from onlinerl.oracles._classifier import SequenceClassifier
from onlinerl.preference_models import GENERAL, advantages, single
from onlinerl.types import Cost, Failure, Query, Verdict


class GeneralPreferenceModel(SequenceClassifier):
    """Compares all responses of a group with each other in one forward pass for each of them; preferences may go in circles.

    P(i beats j) = sigmoid(S[i, j] / tau), S[i, j] = (R v_i) . v_j: "General Preference Modeling with Preference Representations for Aligning
    Language Models" (arXiv 2410.02197), section 4. The log-odds S / tau are divided by `preference_temperature` once more, as everywhere.
    """

    objective: ClassVar[str] = GENERAL
    kind: ClassVar[str] = "general preference model, i.e. a sequence classifier with an even num_labels"

    tau: float | None = Field(None, gt=0)
    """How much of S is odds of e to 1; None is what the model was trained with."""

    @property
    def compares(self) -> bool:
        """It gives no scores."""
        return True

    def _labels_problem(self, labels: int) -> str | None:
        return None if labels % 2 == 0 else "an embedding has an even number"

    def _identity(self) -> str:
        return f"{super()._identity()}\0{self.tau}"

    @property
    def _temperature(self) -> float:
        """`tau`, or what the model says."""
        return self.tau if self.tau is not None else float(self._described.get("tau", 1.0))

    def _rows(self, query: Query) -> list[list[int]]:
        """One of each response."""
        return [single(self._tokenizer, query.prompt, response, self.path) for response in query.responses]

    def _verdict(self, query: Query, outputs: np.ndarray, cost: Cost) -> Verdict | Failure:
        """A matrix of log-odds, from K embeddings."""
        odds = advantages(outputs) / self._temperature
        return _verdicts.from_log_odds(
            odds, len(query.responses), annotator=self._annotator, oracle_version=self.version, cost=cost
        )
