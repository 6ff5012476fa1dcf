"""A language model scores each response by a rubric, over any OpenAI-compatible chat endpoint.

Where the server gives log-probs the score is its expectation, sum n p(n) / sum p(n) over the scores that the token could have said;
otherwise the mean of `votes` replies. P(i beats j) is Bradley-Terry at `preference_temperature`.

Source: Prometheus (arXiv 2310.08491, rubric with levels, `[RESULT] n`); Direct Nash Optimization (arXiv 2404.03715, additive scale, all
responses side by side); G-Eval (arXiv 2303.16634, expected score).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles._judge import plans, reading, templates
from onlinerl.oracles._judge.base import Judge
from onlinerl.oracles._judge.endpoint import Reply
from onlinerl.oracles._judge.questions import Question, Said
from onlinerl.oracles._judge.reading import Form
from onlinerl.types import Prompt, Query, Verdict


class JudgeScore(Judge):
    """Scores single responses, or all of a group side by side."""

    scale: Literal[5, 6, 10] = 5
    """1 to 5 with a description of each; 0 to 6, a point for each criterion that holds; 1 to 10. Many tie at 5."""
    listwise: bool = False
    """One question about all responses of a group. Scores are read from the text then."""
    orders: int = Field(2, ge=1)
    """With `listwise`: how often it is asked, with the responses in another order each time; the mean counts."""

    @model_validator(mode="after")
    def _of_a_list(self) -> Self:
        if not self.listwise and "orders" in self.model_fields_set and self.orders != type(self).model_fields["orders"].default:
            raise ConfigError("is read with oracle.listwise=true only", field="oracle.orders", fix="leave it out, or set that")
        if self.listwise and self.read_from == "logprobs":
            raise ConfigError(
                "is logprobs, and a list of scores is read from the text", field="oracle.read_from", fix="leave it out"
            )
        return self

    @property
    def compares(self) -> bool:
        """It scores."""
        return False

    @property
    def _places(self) -> tuple[str, ...]:
        return ("responses",) if self.listwise else ("response",)

    @property
    def _defaults(self) -> tuple[str, str]:
        return templates.LIST if self.listwise else templates.ONE, templates.RUBRICS[self.scale]

    @property
    def _reads(self) -> Literal["auto", "logprobs", "text"]:
        return "text" if self.listwise else self.read_from

    @property
    def _range(self) -> tuple[int, int]:
        return templates.RANGES[self.scale]

    def _schema(self, k: int) -> Mapping[str, Any]:
        one = {"type": "integer", "enum": list(range(self._range[0], self._range[1] + 1))}
        return {"type": "array", "items": one, "minItems": k, "maxItems": k} if self.listwise else one

    def _identity(self) -> Mapping[str, Any]:
        return {"judge": "score", "scale": self.scale, "listwise": self.listwise, "orders": self.orders if self.listwise else 0}

    def requests(self, responses: int) -> int:
        """One per response and vote, or one per order and vote."""
        return (self.orders if self.listwise else responses) * self.votes

    def _shown(self, responses: int) -> int:
        return responses if self.listwise else 1

    def _questions(self, prompt: Prompt, responses: Sequence[str]) -> dict[Any, list[Question]]:
        return self._of_all(prompt, responses) if self.listwise else self._of_each(prompt, responses)

    def _of_each(self, prompt: Prompt, responses: Sequence[str]) -> dict[Any, list[Question]]:
        form = self._form("score")
        wanted = templates.form_of_score(form.json, form.rationale, *self._range)
        return {
            i: [
                Question(
                    text=self._filled(prompt, wanted, response=templates.escaped(response)),
                    form=form,
                    seed=self._seed(prompt.id, response, vote),
                    read=self._reader(form),
                )
                for vote in range(self.votes)
            ]
            for i, response in enumerate(responses)
        }

    def _of_all(self, prompt: Prompt, responses: Sequence[str]) -> dict[Any, list[Question]]:
        form = self._form("scores")
        wanted = templates.form_of_scores(form.json, form.rationale, *self._range, k=len(responses))
        asked: dict[Any, list[Question]] = {}
        for n in range(self.orders):
            order = plans.shuffled(responses, f"{prompt.id}\0{n}")
            text = self._filled(prompt, wanted, responses=templates.numbered([responses[i] for i in order]))
            read = self._list_reader(form, order)
            asked[f"order {n}"] = [
                Question(text=text, form=form, seed=self._seed(prompt.id, n, vote), read=read) for vote in range(self.votes)
            ]
        return asked

    def _reader(self, form: Form) -> Any:
        low, high = self._range

        def read(reply: Reply) -> tuple[tuple[float, ...], None, str] | None:
            found = form.value(reply)
            score = None if found is None else reading.number(found[0], low, high)
            if found is None or score is None:
                return None
            expected = reading.expected(form, reply, low, high) if self._can.logprobs else None
            return (float(score) if expected is None else expected,), None, found[1]

        return read

    def _list_reader(self, form: Form, order: Sequence[int]) -> Any:
        low, high = self._range

        def read(reply: Reply) -> tuple[tuple[float, ...], None, str] | None:
            found = form.value(reply)
            listed = [] if found is None else found[0].split() if isinstance(found[0], str) else found[0]
            scores = [reading.number(one, low, high) for one in listed] if isinstance(listed, list) else []
            if found is None or len(scores) != len(order) or None in scores:
                return None
            by_response = {i: float(score) for i, score in zip(order, scores, strict=True) if score is not None}
            return tuple(by_response[i] for i in range(len(order))), None, found[1]

        return read

    def _verdict(self, query: Query, said: Mapping[Any, Sequence[Said]]) -> Verdict | None:
        k = len(query.responses)
        given: list[list[float]] = [[] for _ in range(k)]
        for about, votes in said.items():
            for one in votes:
                if one.status == "ok":
                    for i, value in enumerate(one.values) if self.listwise else ((about, one.values[0]),):
                        given[i].append(value)
        scores = tuple(float(np.mean(values)) if values else math.nan for values in given)
        unjudged = tuple(i for i, values in enumerate(given) if not values)
        if k - len(unjudged) < min(2, k):
            return None
        annotator = f"judge_score:{self._named}"
        return Verdict(annotator=annotator, oracle_version=self.version, scores=scores, unjudged=unjudged)
