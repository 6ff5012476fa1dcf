"""Lexicon sentiment: how positive a text sounds. Fast, deterministic and without a model; made for the quickstart and for tests.

Source: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text (compound score).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field, PrivateAttr

from onlinerl.oracles import _verdicts
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict


class Sentiment(Oracle):
    """Scores a text by VADER's compound score: -1 (most negative) to 1 (most positive), 0 if no word carries sentiment."""

    groups_per_call: int = Field(16, ge=1)  # asking again costs nothing
    include_prompt: bool = True
    """Judge prompt and response as one text, so that "not" at the end of a prompt counts; false judges the response alone."""

    _analyzer: Any = PrivateAttr(None)

    def open(self) -> None:
        """Load the lexicon. Idempotent; `judge` calls it too."""
        if self._analyzer is None:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            self._analyzer = SentimentIntensityAnalyzer()

    @property
    def version(self) -> str:
        """Version of the lexicon and what is judged."""
        return f"vader-{_verdicts.version_of('vaderSentiment')}-{'prompt+response' if self.include_prompt else 'response'}"

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores per query, in order."""
        self.open()
        return [self._judge(query) for query in queries]

    def _judge(self, query: Query) -> Verdict | Failure:
        started = time.perf_counter()
        scores = [self._analyzer.polarity_scores(self._text(query, response))["compound"] for response in query.responses]
        cost = Cost(calls=len(scores), seconds=time.perf_counter() - started)
        return _verdicts.from_scores(scores, len(query.responses), annotator="vader", oracle_version=self.version, cost=cost)

    def _text(self, query: Query, response: str) -> str:
        if not self.include_prompt:
            return response
        if query.prompt.messages:  # the words of the conversation, without the markers of a chat template
            return "\n".join([*(message.content for message in query.prompt.messages), response])
        return query.prompt.text + response
