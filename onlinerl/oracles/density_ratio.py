"""How much likelier a response is to a strong model than to a weak one.

Source: "CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference Annotation" (arXiv 2411.02481), equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.oracles._log_probs import LogProbs, Row
from onlinerl.oracles._model_files import absolute
from onlinerl.types import Query


class DensityRatio(LogProbs):
    """Scores log strong(y | criteria, x) - log weak(y | x) in nats, over the tokens of the response and the one that ends it."""

    strong: str
    """Directory or hub id of the better model, e.g. one that was aligned."""
    weak: str
    """That of the worse one, e.g. what the strong one was made of. Both have the same tokenizer."""
    criteria: str | None = None
    """What the strong model is told first, as a system message: what a good answer is, perhaps with examples."""
    length_norm: Literal["none", "mean"] = "none"
    """Whether the ratio of all tokens counts, which long responses have more of, or the mean of a token."""
    clip_token: float | None = Field(10.0, gt=0)
    """Most that one token may count, in nats."""

    @field_validator("strong", "weak")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        return absolute(path, str(info.field_name))

    def _models(self) -> dict[str, str]:
        return {"strong": self.strong, "weak": self.weak}

    def _identity(self) -> Mapping[str, Any]:
        return self.model_dump(include={"criteria", "length_norm", "clip_token"})

    def _rows(self, query: Query, response: str) -> list[tuple[str, Row]]:
        contexts = {"strong": self._context("strong", query, before=self.criteria), "weak": self._context("weak", query)}
        return [(key, self._row(key, query, context, response, ends=True)) for key, context in contexts.items()]

    def _score(self, logprobs: Sequence[np.ndarray]) -> float:
        strong, weak = logprobs
        ratios = strong - weak
        if self.clip_token is not None:
            ratios = np.clip(ratios, -self.clip_token, self.clip_token)
        return float(ratios.mean() if self.length_norm == "mean" and len(ratios) else ratios.sum())
