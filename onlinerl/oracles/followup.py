"""What a user would say next: a response is good if a chat model finds content follow-ups likelier after it than discontent ones.

Source: "Aligning Language Models Using Follow-up Likelihood as Reward Signal" (arXiv 2409.13948), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from onlinerl.errors import OracleError
from onlinerl.oracles._log_probs import LogProbs, Row
from onlinerl.oracles._model_files import absolute
from onlinerl.types import Message, Query

POSITIVE = (
    "Thank you, that is exactly what I needed.",
    "Great, that answers my question completely.",
    "That is very helpful, thanks a lot.",
    "Perfect, this makes sense now.",
    "Wow, that is a wonderful answer.",
)
NEGATIVE = (
    "That is not what I asked for.",
    "This is wrong, please try again.",
    "You did not understand my question.",
    "That does not help me at all.",
    "This makes no sense.",
)


class Followup(LogProbs):
    """Scores the mean log-prob of a token of `positive` follow-ups less that of `negative` ones, in nats, each the user's next turn."""

    path: str
    """Directory or hub id of a frozen chat model."""
    positive: tuple[str, ...] = Field(POSITIVE, min_length=1)
    """What a user says who is content."""
    negative: tuple[str, ...] = Field(NEGATIVE, min_length=1)
    """What one says who is not."""

    preference_temperature: float = Field(0.1, gt=0)
    """As for every oracle. Differences of a mean token are small: 0.1 nats mean odds of 2.7 to 1."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return absolute(path, "path")

    @field_validator("positive", "negative")
    @classmethod
    def _said(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(text.strip() for text in texts):
            raise ValueError("holds a text that says nothing")
        return texts

    def _models(self) -> dict[str, str]:
        return {"path": self.path}

    def _identity(self) -> Mapping[str, Any]:
        return self.model_dump(include={"positive", "negative"})

    def _rows(self, query: Query, response: str) -> list[tuple[str, Row]]:
        return [
            ("path", self._row("path", query, self._before(query, response, text), text, ends=False))
            for text in self.positive + self.negative
        ]

    def _before(self, query: Query, response: str, text: str) -> str:
        """All that stands before a follow-up, with what the template writes where a user's turn begins."""
        if not query.prompt.messages:
            return self._context("path", query) + response + "\n\n"
        turns = (Message(role="assistant", content=response), Message(role="user", content=text))
        whole = self._context("path", query, after=turns)
        before, found, _ = whole.rpartition(text.strip())
        if not found:
            raise OracleError(
                f"the chat template of {self.path} changes {text!r}",
                field="oracle.path",
                fix="write that follow-up in another way",
            )
        return before

    def _score(self, logprobs: Sequence[np.ndarray]) -> float:
        means = [float(each.mean()) for each in logprobs]
        n = len(self.positive)
        return float(np.mean(means[:n]) - np.mean(means[n:]))
