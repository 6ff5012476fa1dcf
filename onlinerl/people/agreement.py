"""How far people who were asked the same agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from onlinerl.people.queue import Answer


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of all pairs of people."""

    share: float | None
    """Of the questions answered by both, those with the same answer; None without any."""
    kappa: float | None
    """Cohen's kappa, the mean over pairs of people, each weighted by the questions that both have answered. None without any, and where
    chance alone would make them agree."""
    answers: int
    """Pairs of answers to the same question."""


def agreement(questions: Iterable[Sequence[Answer]]) -> Agreement:
    """Of left, right and neither (a tie, or both bad); a skip says nothing.

    Cohen, "A coefficient of agreement for nominal scales", 1960: kappa = (p_o - p_e) / (1 - p_e), with p_e from the shares of each person's
    own answers.
    """
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for answers in questions:
        said = {answer.annotator: _category(answer) for answer in answers if answer.choice != "skip"}
        for one, other in combinations(sorted(said), 2):
            pairs[one, other].append((said[one], said[other]))
    total = sum(map(len, pairs.values()))
    same = sum(a == b for both in pairs.values() for a, b in both)
    kappas = [(len(both), kappa) for both in pairs.values() if (kappa := _kappa(both)) is not None]
    weight = sum(n for n, _ in kappas)
    return Agreement(
        share=same / total if total else None,
        kappa=sum(n * kappa for n, kappa in kappas) / weight if weight else None,
        answers=total,
    )


def _category(answer: Answer) -> str:
    return answer.choice if answer.choice in ("left", "right") else "neither"


def _kappa(both: Sequence[tuple[str, str]]) -> float | None:
    n = len(both)
    observed = sum(a == b for a, b in both) / n
    first, second = Counter(a for a, _ in both), Counter(b for _, b in both)
    chance = sum(first[category] * second[category] for category in first) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)
