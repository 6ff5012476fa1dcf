"""How far people who were asked the same agree, and how often they are right where the answer is known."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from onlinerl.people.queue import Answer, Queue
from onlinerl.protocols.oracle import Figure


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of all pairs of people."""

    share: float | None
    """Of the questions answered by both, those with the same answer; None without any."""
    kappa: float | None
    """Cohen's kappa, the mean over pairs of people, each weighted by the questions that both have answered. None without any, and where
    chance alone would make them agree."""
    kappa_se: float | None
    """Its standard error."""
    answers: int
    """Pairs of answers to the same question."""


def agreement(questions: Iterable[Sequence[Answer]]) -> Agreement:
    """Of left, right and neither (a tie, or both bad); a skip says nothing.

    Cohen, "A coefficient of agreement for nominal scales", 1960: kappa = (p_o - p_e) / (1 - p_e), with p_e from the shares of each person's
    own answers, and se = sqrt(p_o (1 - p_o) / n) / (1 - p_e).
    """
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for answers in questions:
        said = {answer.annotator: _category(answer) for answer in answers if answer.choice != "skip"}
        for one, other in combinations(sorted(said), 2):
            pairs[one, other].append((said[one], said[other]))
    total = sum(map(len, pairs.values()))
    same = sum(a == b for both in pairs.values() for a, b in both)
    kappas = [(len(both), *kappa) for both in pairs.values() if (kappa := _kappa(both)) is not None]
    weight = sum(n for n, _, _ in kappas)
    return Agreement(
        share=same / total if total else None,
        kappa=sum(n * kappa for n, kappa, _ in kappas) / weight if weight else None,
        kappa_se=math.hypot(*(n * se for n, _, se in kappas)) / weight if weight else None,
        answers=total,
    )


def _category(answer: Answer) -> str:
    return answer.choice if answer.choice in ("left", "right") else "neither"


def _kappa(both: Sequence[tuple[str, str]]) -> tuple[float, float] | None:
    """And its standard error."""
    n = len(both)
    observed = sum(a == b for a, b in both) / n
    first, second = Counter(a for a, _ in both), Counter(b for _, b in both)
    chance = sum(first[category] * second[category] for category in first) / n**2
    if chance == 1:
        return None
    return (observed - chance) / (1 - chance), math.sqrt(observed * (1 - observed) / n) / (1 - chance)


@dataclass(frozen=True, kw_only=True)
class GoldAccuracy:
    """Of answers to questions whose answer is known."""

    share: float
    """Of the answers, those that are right; a tie, or both bad, is half."""
    answers: int


def gold_accuracy(queue: Queue) -> dict[str, GoldAccuracy]:
    """By person; a skip says nothing, and who has said nothing is not there."""
    right: dict[str, list[float]] = defaultdict(list)
    for question in queue.gold():
        for answer in queue.answers(question.id):
            if answer.choice != "skip":
                category = _category(answer)
                right[answer.annotator].append(0.5 if category == "neither" else float(category == question.gold))
    return {who: GoldAccuracy(share=sum(found) / len(found), answers=len(found)) for who, found in sorted(right.items())}


def figures(queue: Queue) -> list[Figure]:
    """What an oracle that asks people says of them."""
    answers = [queue.answers(one.id) for one in queue.questions()]
    found = [
        Figure("people_questions", float(len(queue.open())), labels={"state": "open"}),
        Figure("people_questions", float(sum(map(bool, answers))), labels={"state": "answered"}),
    ]
    agreed, gold = agreement(answers), gold_accuracy(queue).values()
    if agreed.share is not None:
        found.append(Figure("people_agreement", agreed.share, n=agreed.answers))
    if agreed.kappa is not None:
        found.append(Figure("people_kappa", agreed.kappa, n=agreed.answers, se=agreed.kappa_se))
    if n := sum(one.answers for one in gold):
        found.append(Figure("people_gold_accuracy", sum(one.share * one.answers for one in gold) / n, n=n))
    return found
