"""The reward that a preference-trained model implies: how much likelier a response has become to it than to the model it was trained from.

Sources: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (arXiv 2305.18290), equation 5; "Aligning Large
Language Models with Self-generated Preference Data" (SPA, arXiv 2406.04412), equation 6, for labels from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles._log_probs import LogProbs, Row
from onlinerl.oracles._model_files import absolute
from onlinerl.types import Query


class Implicit(LogProbs):
    """Scores beta * (log policy(y | x) - log reference(y | x)). With both paths the models are frozen: iterates or checkpoints of a run that is
    finished, such as `runs/first/exports/0002` and the model that it began with. Without `policy` it is the iterate that each iteration
    samples from, another one in each iteration, as in SPA."""

    policy: str | None = None
    """Directory or hub id of the model that preferences were trained into; by default the iterate that the iteration samples from. Then the
    run's `model` itself must have been trained on preferences, from `reference`: else all scores of the first iteration are 0."""
    reference: str | None = None
    """That of the model it was trained from; the run's `model` by default."""
    beta: float = Field(0.1, gt=0)
    """As in that training: score differences are log-odds then."""
    length_norm: bool = False
    """Whether the mean over the tokens counts instead of the sum; choose a `beta` larger by the usual length."""

    @field_validator("policy", "reference")
    @classmethod
    def _absolute(cls, path: str | None, info: ValidationInfo) -> str | None:
        return None if path is None else absolute(path, str(info.field_name))

    @property
    def _moves(self) -> bool:
        return self.policy is None

    def of_policy(self, model: str) -> Self:
        """The same for a run that begins with this model.

        Raises:
            ConfigError: if it would compare this model with itself.
        """
        if self.policy is None and absolute(self.reference or model, "reference") == absolute(model, "reference"):
            raise ConfigError(
                f"is {model}, with which the run begins, and oracle.policy is left out: in the first iteration it would be compared with itself, and "
                "all scores would be 0",
                field="oracle.reference",
                fix="give the model that the run's own was trained from on preferences; or give oracle.policy, a model that stays",
            )
        return super().of_policy(model)

    def _models(self) -> dict[str, str]:
        return {
            "policy": self._reloaded or self._own(self.policy, "policy"),
            "reference": self._own(self.reference, "reference"),
        }

    def _identity(self) -> Mapping[str, Any]:
        return self.model_dump(include={"beta", "length_norm"})

    def _rows(self, query: Query, response: str) -> list[tuple[str, Row]]:
        return [(key, self._row(key, query, self._context(key, query), response, ends=True)) for key in self._models()]

    def _score(self, logprobs: Sequence[np.ndarray]) -> float:
        ratios = logprobs[0] - logprobs[1]
        return self.beta * float(ratios.mean() if self.length_norm and len(ratios) else ratios.sum())
