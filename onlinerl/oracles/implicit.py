"""The reward that a preference-trained model implies: how much likelier a response has become to it than to the model it was trained from.

Sources: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (arXiv 2305.18290), equation 5; "Aligning Large
Language Models with Self-generated Preference Data" (SPA, arXiv 2406.04412), equation 6, for labels from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.oracles._log_probs import LogProbs, Row
from onlinerl.oracles._model_files import absolute
from onlinerl.types import Query


class Implicit(LogProbs):
    """Scores beta * (log policy(y | x) - log reference(y | x)). Both models are frozen: iterates or checkpoints of a run that is finished,
    such as `runs/first/exports/0002` and the model that it began with."""

    policy: str
    """Directory or hub id of the model that preferences were trained into."""
    reference: str
    """That of the model it was trained from."""
    beta: float = Field(0.1, gt=0)
    """As in that training: score differences are log-odds then."""
    length_norm: bool = False
    """Whether the mean over the tokens counts instead of the sum; choose a `beta` larger by the usual length."""

    @field_validator("policy", "reference")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        return absolute(path, str(info.field_name))

    def _models(self) -> dict[str, str]:
        return {"policy": self.policy, "reference": self.reference}

    def _identity(self) -> Mapping[str, Any]:
        return self.model_dump(include={"beta", "length_norm"})

    def _rows(self, query: Query, response: str) -> list[tuple[str, Row]]:
        return [(key, self._row(key, query, self._context(key, query), response, ends=True)) for key in self._models()]

    def _score(self, logprobs: Sequence[np.ndarray]) -> float:
        ratios = logprobs[0] - logprobs[1]
        return self.beta * float(ratios.mean() if self.length_norm and len(ratios) else ratios.sum())
