"""A language model compares the responses to a prompt two by two, over any OpenAI-compatible chat endpoint.

P_raw[i][j] = P(i beats j), i shown first. Where the server gives log-probs, L_raw = log p(A) - log p(B) of the token that says the verdict,
and P = sigmoid((L_raw - L_raw^T) / 2) has no position bias that adds to the log-odds; otherwise P_raw = (wins + ties / 2) / votes, and
P = (P_raw + 1 - P_raw^T) / 2.

Source: Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena (arXiv 2306.05685, both orders); Prometheus 2 (arXiv 2405.01535, the last line).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from onlinerl.oracles._judge import plans, reading, templates
from onlinerl.oracles._judge.base import Judge
from onlinerl.oracles._judge.endpoint import Reply
from onlinerl.oracles._judge.questions import Question, Said
from onlinerl.oracles._judge.reading import Form
from onlinerl.types import Prompt, Query, Verdict

_WORTH = {"A": 1.0, "B": 0.0, "tie": 0.5}


class JudgePair(Judge):
    """Compares; it is never asked about a single response."""

    query_plan: plans.Plan = "all_pairs_both"
    """Which comparisons: all pairs in both orders, K(K-1); all pairs in one order each, chosen at random; `ring`, each with the next of a
    random order, both ways, 2K; `vs_anchor`, all with one chosen at random, both ways, 2(K-1)."""
    on_disagree: Literal["average", "tie", "drop"] = "average"
    """What a pair is whose two orders name different winners: the mean of both, a tie, or not judged."""
    ties: bool = True
    """Whether the judge may call a tie; not asked where log-probs are read, which say how close it is."""

    @property
    def compares(self) -> bool:
        """It gives no scores."""
        return True

    @property
    def _places(self) -> tuple[str, ...]:
        return ("response_a", "response_b")

    @property
    def _defaults(self) -> tuple[str, str]:
        return templates.PAIR, templates.COMPARE

    @property
    def _labels(self) -> tuple[str, ...]:
        return ("A", "B", "tie") if self.ties and not self._can.logprobs else ("A", "B")

    @property
    def _may_be_cut(self) -> bool:
        return not self.rationale and self._can.logprobs

    def _schema(self, k: int) -> Mapping[str, Any]:
        return {"type": "string", "enum": list(self._labels)}

    def _identity(self) -> Mapping[str, Any]:
        return {"judge": "pair", "plan": self.query_plan, "on_disagree": self.on_disagree, "ties": self.ties}

    def requests(self, responses: int) -> int:
        """Comparisons times votes."""
        return plans.count(self.query_plan, responses) * self.votes

    def _shown(self, responses: int) -> int:
        return 2

    def _questions(self, prompt: Prompt, responses: Sequence[str]) -> dict[Any, list[Question]]:
        form = self._form("verdict")
        wanted = templates.form_of_choice(form.json, form.rationale, "tie" in self._labels)
        asked: dict[Any, list[Question]] = {}
        for i, j in plans.cells(self.query_plan, responses, prompt.id):
            first, second = responses[i], responses[j]
            texts = {"response_a": templates.escaped(first), "response_b": templates.escaped(second)}
            text = self._filled(prompt, wanted, **texts)
            asked[i, j] = [
                Question(text=text, form=form, seed=self._seed(prompt.id, first, second, vote), read=self._reader(form))
                for vote in range(self.votes)
            ]
        return asked

    def _reader(self, form: Form) -> Any:
        def read(reply: Reply) -> tuple[tuple[float, ...], float | None, str] | None:
            found = reading.choice(form, reply, self._labels)
            named, why = found or (None, "")
            if not self._can.logprobs:
                return None if named is None else ((_WORTH[named],), None, why)
            # Without a rationale the first token has log-probs of both, whatever the reply goes on with.
            odds = reading.log_odds(form, reply, named) if named is not None or not form.rationale else None
            return None if odds is None else ((1 / (1 + math.exp(-odds)),), odds, why)

        return read

    def _verdict(self, query: Query, said: Mapping[Any, Sequence[Said]]) -> Verdict | None:
        k = len(query.responses)
        preferences, odds = np.full((2, k, k), np.nan)
        for cell, votes in said.items():
            given = [one for one in votes if one.status == "ok"]
            if not given:
                continue
            if self._can.logprobs:
                odds[cell] = np.mean([one.log_odds for one in given if one.log_odds is not None])
                preferences[cell] = 1 / (1 + math.exp(-odds[cell]))
            else:
                preferences[cell] = np.mean([one.values[0] for one in given])
        verdict = Verdict(
            annotator=f"judge_pair:{self._named}",
            oracle_version=self.version,
            preferences=_rows(preferences),
            log_odds=_rows(odds) if self._can.logprobs else None,
            on_disagree=self.on_disagree,
        )
        return verdict if k < 2 or (~np.isnan(preferences)).any() else None


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
