"""The only way oracles of this package make a Verdict: numbers are checked first, so a bad one can only become a Failure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from onlinerl.errors import OracleError
from onlinerl.types import Cost, Failure, Prompt, Replies, Verdict
from onlinerl.types.labels import disagreement


def from_scores(
    scores: object, count: int, *, annotator: str, oracle_version: str, cost: Cost | None = None, raw: str | None = None
) -> Verdict | Failure:
    """A Verdict of `count` finite scores, higher is better; anything else is a Failure.

    Args:
        scores: the K numbers; anything with `tolist()` (numpy, torch) or any sequence. Booleans count as 0 and 1.
        count: K, how many responses were asked about.
        annotator, oracle_version, cost, raw: copied into the Verdict.
    """
    values = _numbers(scores, count, "scores")
    if isinstance(values, Failure):
        return values
    return Verdict(annotator=annotator, oracle_version=oracle_version, scores=values, cost=cost or Cost(), raw=raw)


def from_each(
    found: Sequence[float | Failure],
    *,
    annotator: str,
    oracle_version: str,
    cost: Cost,
) -> Verdict | Failure:
    """A Verdict of responses that are judged one by one, with a Failure in place of the score of each that could not be: it is not judged, and
    is counted. A Failure where so few are left that nothing can be compared.

    Args:
        found: of each response, in order.
        annotator, oracle_version, cost: copied into the Verdict.
    """
    failures = {i: one for i, one in enumerate(found) if isinstance(one, Failure)}
    replies = Replies(asked=len(found), failed=dict(Counter(one.kind for one in failures.values())))
    words = "\n".join(f"response {i}: {one.kind}: {one.message}" for i, one in failures.items()) or None
    if len(found) - len(failures) < min(2, len(found)):
        kind = max(replies.failed, key=lambda kind: replies.failed[kind])
        first = next(one for one in failures.values() if one.kind == kind)
        message = f"{len(failures)} of {len(found)} responses could not be judged; first {kind}: {first.message}"
        return Failure(kind=first.kind, message=message, cost=cost, replies=replies)
    return Verdict(
        annotator=annotator,
        oracle_version=oracle_version,
        scores=tuple(math.nan if isinstance(one, Failure) else float(one) for one in found),
        unjudged=tuple(failures),
        raw=words,
        cost=cost,
        replies=replies,
    )


def from_components(
    scores: object, count: int, *, annotator: str, oracle_version: str, cost: Cost | None = None, raw: str | None = None
) -> Verdict | Failure:
    """A Verdict of several named scores: a dict that holds, by name, `count` finite numbers, those of `score` among them."""
    if not isinstance(scores, Mapping) or "score" not in scores:
        return Failure(kind="parse_fail", message=f"named scores are a dict with `score` among its names, got {_shown(scores)}")
    values: dict[str, tuple[float, ...]] = {}
    for name, listed in scores.items():
        numbers = _numbers(listed, count, f"scores {name!r}")
        if isinstance(numbers, Failure):
            return numbers
        values[name] = numbers
    return Verdict(
        annotator=annotator,
        oracle_version=oracle_version,
        scores=values.pop("score"),
        components=values or None,
        cost=cost or Cost(),
        raw=raw,
    )


def from_matrix(
    matrix: object, count: int, *, annotator: str, oracle_version: str, cost: Cost | None = None, raw: str | None = None
) -> Verdict | Failure:
    """A Verdict of `count` x `count` probabilities; anything else is a Failure.

    Cell [i][j] is P(i beats j) with i shown first, within [0, 1]. None means "not asked in this order"; every pair must have been
    asked in at least one order, because a response that was never compared would look like an average one. The diagonal is
    ignored.
    """
    rows = _listed(matrix)
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return Failure(kind="parse_fail", message=f"preferences must be a {count} x {count} list, got {_shown(matrix)}")
    if len(rows) != count:
        return Failure(kind="wrong_length", message=f"{len(rows)} rows of preferences for {count} responses")
    cells: list[tuple[float, ...]] = []
    for i, row in enumerate(rows):
        listed = _listed(row)
        if isinstance(listed, Sequence) and not isinstance(listed, str):
            listed = [0.5 if i == j or cell is None else cell for j, cell in enumerate(listed)]
        values = _numbers(listed, count, f"row {i} of preferences")
        if isinstance(values, Failure):
            return values
        wrong = next((v for v in values if not 0 <= v <= 1), None)
        if wrong is not None:
            return Failure(kind="parse_fail", message=f"row {i} of preferences holds {wrong}, which is not a probability")
        # A Verdict marks cells that were not asked, the diagonal among them, as NaN.
        cells.append(tuple(math.nan if i == j or _listed(row)[j] is None else v for j, v in enumerate(values)))
    for i in range(count):
        for j in range(i):
            if math.isnan(cells[i][j]) and math.isnan(cells[j][i]):
                return Failure(kind="error", message=f"responses {j} and {i} were compared in neither order")
    return Verdict(annotator=annotator, oracle_version=oracle_version, preferences=tuple(cells), cost=cost or Cost(), raw=raw)


def from_log_odds(
    odds: np.ndarray, count: int, *, annotator: str, oracle_version: str, cost: Cost | None = None
) -> Verdict | Failure:
    """A Verdict of `count` x `count` log-odds that i beats j with i shown first; the diagonal is ignored, any other cell must be finite."""
    table = np.array(odds, dtype=np.float64).reshape(count, count)
    np.fill_diagonal(table, math.nan)
    with np.errstate(over="ignore"):  # huge odds saturate at 0 or 1, which is what they mean
        probs = 1.0 / (1.0 + np.exp(-table))
    rows = [[None if i == j else cell for j, cell in enumerate(row)] for i, row in enumerate(probs.tolist())]
    if np.isinf(table).any():
        return Failure(kind="non_finite", message="the model's log-odds are infinite", cost=cost or Cost())
    verdict = from_matrix(rows, count, annotator=annotator, oracle_version=oracle_version, cost=cost)
    return replace(verdict, log_odds=tuple(map(tuple, table.tolist()))) if isinstance(verdict, Verdict) else verdict


def from_members(
    members: object, count: int, *, annotator: str, oracle_version: str, cost: Cost | None = None, scores: object = None
) -> Verdict | Failure:
    """A Verdict of what several judges, or one judge several times, say of `count` responses: the mean of their probabilities, and by how
    much they disagree.

    Args:
        members: each as for `from_matrix`; all must have compared the same pairs in the same order.
        count: K, how many responses were asked about.
        annotator, oracle_version, cost: copied into the Verdict.
        scores: K numbers beside them; None if there are none.
    """
    listed, values = _listed(members), None if scores is None else _numbers(scores, count, "scores")
    if isinstance(values, Failure):
        return values
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return Failure(kind="parse_fail", message=f"members must be a list of {count} x {count} lists, got {_shown(members)}")
    verdicts: list[Verdict] = []
    for number, member in enumerate(listed):
        verdict = from_matrix(member, count, annotator=annotator, oracle_version=oracle_version)
        if isinstance(verdict, Failure):
            return Failure(kind=verdict.kind, message=f"member {number}: {verdict.message}")
        verdicts.append(verdict)
    if len(verdicts) < 2:
        return Failure(kind="wrong_length", message=f"{len(verdicts)} judgement, and one cannot disagree with itself")
    raw = np.asarray([verdict.preferences for verdict in verdicts], dtype=np.float64)
    if (np.isnan(raw) != np.isnan(raw[0])).any():
        return Failure(kind="error", message="members did not compare the same responses in the same order")
    return Verdict(
        annotator=annotator,
        oracle_version=oracle_version,
        scores=values,
        preferences=tuple(map(tuple, raw.mean(axis=0).tolist())),
        uncertainty=nats_of([verdict.matrix() for verdict in verdicts]),
        cost=cost or Cost(),
    )


def nats_of(members: Sequence[np.ndarray]) -> tuple[tuple[float, ...], ...]:
    """`disagreement` of matrices [K, K], as a Verdict has it."""
    return tuple(map(tuple, disagreement(np.stack(members)).tolist()))


def turned(verdict: Verdict) -> Verdict:
    """The verdict about the same responses in the reverse order."""

    def lines(cells: tuple[tuple[float, ...], ...] | None) -> tuple[tuple[float, ...], ...] | None:
        return None if cells is None else tuple(line[::-1] for line in cells[::-1])

    last = len(verdict.scores or ()) - 1
    return replace(
        verdict,
        scores=None if verdict.scores is None else verdict.scores[::-1],
        unjudged=tuple(sorted(last - k for k in verdict.unjudged)),
        preferences=lines(verdict.preferences),
        log_odds=lines(verdict.log_odds),
        strength=lines(verdict.strength),
        uncertainty=lines(verdict.uncertainty),
        components=None if verdict.components is None else {name: values[::-1] for name, values in verdict.components.items()},
    )


def _numbers(values: object, count: int, what: str) -> tuple[float, ...] | Failure:
    listed = _listed(values)
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return Failure(kind="parse_fail", message=f"{what} must be a list of {count} numbers, got {_shown(values)}")
    if len(listed) != count:
        return Failure(kind="wrong_length", message=f"{what}: {len(listed)} numbers for {count} responses")
    numbers: list[float] = []
    for index, value in enumerate(listed):
        value = _listed(value)  # numpy and torch scalars become Python numbers
        if not isinstance(value, int | float):
            return Failure(kind="parse_fail", message=f"{what}: entry {index} is {_shown(value)}, not a number")
        try:
            number = float(value)
        except OverflowError:
            return Failure(kind="non_finite", message=f"{what}: entry {index} is a whole number too large for a float")
        if not math.isfinite(number):
            return Failure(kind="non_finite", message=f"{what}: entry {index} is {number}")
        numbers.append(number)
    return tuple(numbers)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


@cache
def version_of(package: str) -> str:
    """Of an installed package; looked up once, because every verdict says it."""
    return metadata.version(package)


def answer_of(prompt: Prompt, lacks: str = " to compare with", example: str = "...") -> str:
    """The reference answer of a prompt.

    Args:
        prompt: that must carry one.
        lacks: what follows the words "has no reference answer".
        example: of one.

    Raises:
        OracleError: if it has none.
    """
    if prompt.reference_answer is None:
        raise OracleError(
            f"prompt {prompt.id!r} has no reference answer{lacks}",
            field="prompts",
            fix=f'add "reference_answer": "{example}" to its line in the prompt file',
        )
    return str(prompt.reference_answer)


def sure(matrix: np.ndarray) -> float:
    """Mean of |2 P - 1| over the pairs that were judged; 0 if none was."""
    gaps = np.abs(2 * matrix - 1)[np.triu_indices(len(matrix), k=1)]
    known = gaps[~np.isnan(gaps)]
    return float(known.mean()) if len(known) else 0.0


def as_preferences(verdict: Verdict) -> Verdict:
    """The same without scores, for an oracle whose verdicts are of several oracles; log-odds at the temperature of who gave them."""
    if verdict.preferences is None:
        preferences, log_odds = verdict.matrix().copy(), None
        np.fill_diagonal(preferences, np.nan)
    else:
        preferences = np.asarray(verdict.preferences, np.float64)
        log_odds = None if verdict.log_odds is None else np.asarray(verdict.log_odds, np.float64) / verdict.temperature
    return replace(
        verdict,
        scores=None,
        unjudged=(),
        preferences=tuple(map(tuple, preferences.tolist())),
        log_odds=None if log_odds is None else tuple(map(tuple, log_odds.tolist())),
        components=None,
        strength=None,
        uncertainty=None,
    )


def as_cells(
    texts: Sequence[str], known: Mapping[tuple[str, str], Sequence[float]], *, equal: float
) -> tuple[tuple[float, ...], ...]:
    """[K][K]: the mean of what is known of two texts, the first shown on the left; `equal` of equal ones; NaN elsewhere and on the diagonal."""
    cells = np.full((len(texts), len(texts)), np.nan)
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            if i != j and one == other:
                cells[i, j] = equal
            elif (one, other) in known:
                cells[i, j] = np.mean(known[one, other])
    return tuple(map(tuple, cells.tolist()))
