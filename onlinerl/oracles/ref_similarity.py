"""How like the reference answer is a response? Words and characters in common, without a model.

Sources: "Learning from Reference Answers: Versatile Language Model Alignment without Binary Human Preference Data" (RefAlign, arXiv 2504.09895) for
similarity as the reward; "ROUGE: A Package for Automatic Evaluation of Summaries" (ROUGE-L, F with beta 1); SQuAD's token F1; "chrF: character
n-gram F-score for automatic MT evaluation" (n up to 6, beta 2).
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

from pydantic import Field

from onlinerl.oracles import _verdicts
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict

WORD = re.compile(r"\w+|[^\w\s]")
LONGEST_CHARACTERS, CHRF_BETA = 6, 2.0


class RefSimilarity(Oracle):
    """Scores from 0, nothing in common, to 1, the same; of several reference answers the one most like it counts."""

    groups_per_call: int = Field(16, ge=1)  # asking again costs nothing
    metric: Literal["token_f1", "rouge_l", "chrf"] = "rouge_l"
    """`token_f1`: words in common, in any order. `rouge_l`: the longest common sequence of words. `chrf`: characters in common, up to six in
    a row. Words in lower case; a sign is a word."""
    len_ratio_penalty: float = Field(0.0, ge=0)
    """What is subtracted for each time that a response is longer than the reference answer, in words: twice as long costs this once."""

    preference_temperature: float = Field(0.2, gt=0)
    """As for every oracle. Scores are between 0 and 1: a difference of 0.2 means odds of 2.7 to 1."""

    @property
    def version(self) -> str:
        """The metric."""
        return f"ref-similarity-1-{self.metric}-{self.len_ratio_penalty:g}"

    @property
    def needs_reference_answer(self) -> bool:
        """Nothing to compare with otherwise."""
        return True

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores per query, in order.

        Raises:
            OracleError: if a prompt has no reference answer.
        """
        for query in queries:
            _verdicts.answer_of(query.prompt)
        return [self._judge(query) for query in queries]

    def _judge(self, query: Query) -> Verdict | Failure:
        started = time.perf_counter()
        answers = references(str(query.prompt.reference_answer))
        scores = [max(self._score(response, answer) for answer in answers) for response in query.responses]
        cost = Cost(calls=len(scores), seconds=time.perf_counter() - started)
        return _verdicts.from_scores(scores, len(scores), annotator=self.metric, oracle_version=self.version, cost=cost)

    def _score(self, response: str, answer: str) -> float:
        said, wanted = WORD.findall(response.lower()), WORD.findall(answer.lower())
        if self.metric == "token_f1":
            likeness = f_score(*common(said, wanted))
        elif self.metric == "rouge_l":
            likeness = f_score(longest_common(said, wanted), len(said), len(wanted))
        else:
            likeness = chrf(response.lower(), answer.lower())
        longer = max(0.0, len(said) / len(wanted) - 1.0) if wanted else 0.0
        return likeness - self.len_ratio_penalty * longer


def references(answer: str) -> list[str]:
    """One, or several that stand in a JSON list of texts."""
    if answer.lstrip().startswith("["):
        try:
            found = json.loads(answer)
        except ValueError:
            return [answer]
        if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
            return found
    return [answer]


def f_score(both: int, said: int, wanted: int, beta: float = 1.0) -> float:
    """(1 + beta^2) P R / (beta^2 P + R), P = both / said, R = both / wanted; two empty texts are the same."""
    if said == wanted == 0:
        return 1.0
    return (1 + beta**2) * both / (beta**2 * wanted + said) if both else 0.0


def common(one: Sequence[Hashable], other: Sequence[Hashable]) -> tuple[int, int, int]:
    """How many they share, each as often as both have it; and how many each has."""
    return (Counter(one) & Counter(other)).total(), len(one), len(other)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence that is in both, perhaps with gaps. Takes len(one) * len(other) steps."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for j, each in enumerate(other, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == each else max(row[j], row[j - 1])
    return row[-1]


def chrf(one: str, other: str) -> float:
    """Mean over n of the F score of n characters in a row, white space left out; recall counts twice as much as precision."""
    a, b = "".join(one.split()), "".join(other.split())
    if not a and not b:
        return 1.0
    scores = []
    for n in range(1, min(LONGEST_CHARACTERS, max(len(a), len(b))) + 1):
        grams = [[text[i : i + n] for i in range(len(text) - n + 1)] for text in (a, b)]
        if any(grams):
            scores.append(f_score(*common(*grams), beta=CHRF_BETA))
    return sum(scores) / len(scores)
