"""What a judge's reply says: strictly, so that what is no verdict is a failure and never a guess."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onlinerl.oracles._judge.endpoint import Reply, Token

MARK = "[RESULT]"
"""Before the verdict, on the last line of a reply in words (Prometheus)."""
_MARK = re.compile(r"\[RESULT\][ \t]*")
FARTHEST = 50.0
"""Log-odds beyond this say nothing more."""
SPLIT = 0.01
"""With digits as tokens, 1 may be the start of 10: how probable it may be before that matters."""
_AROUND = ' \n\t"[{('


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the reply has to look.

    Either a JSON object with the keys `rationale` (if wanted) and `key`; or words, whose last line is the mark and the verdict; or, in words
    without rationale, the verdict alone.
    """

    key: str
    """Of the verdict in JSON."""
    json: bool
    rationale: bool

    def value(self, reply: Reply) -> tuple[Any, str] | None:
        """The verdict (a text where the reply is in words) and the rationale; None if there is no verdict in this form."""
        if self.json:
            found = _object(reply.text)
            wanted = {self.key, "rationale"} if self.rationale else {self.key}
            if found is None or found.keys() != wanted or not isinstance(found.get("rationale", ""), str):
                return None
            return found[self.key], found.get("rationale", "")
        lines = reply.text.strip().splitlines()
        if not lines:
            return None
        *said, last = lines
        marked = _MARK.match(last)
        if marked is None and (self.rationale or said):
            return None
        return last[marked.end() if marked else 0 :].strip(), "\n".join(said).strip()

    def place(self, text: str) -> int | None:
        """Index of the character that the verdict begins with."""
        if not self.json and not self.rationale and MARK not in text:
            return len(text) - len(text.lstrip()) if text.strip() else None
        sought = re.compile(rf'"{self.key}"\s*:\s*"?') if self.json else _MARK
        ends = [found.end() for found in sought.finditer(text)]
        return ends[-1] if ends and ends[-1] < len(text) else None


def choice(form: Form, reply: Reply, labels: Sequence[str]) -> tuple[str, str] | None:
    """Which of the labels the reply names, and why; None if it names none."""
    found = form.value(reply)
    return None if found is None or found[0] not in labels else (str(found[0]), found[1])


def number(value: Any, low: int, high: int) -> int | None:
    """A whole number in the range, as a number or its digits; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}", value):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else None


def log_odds(form: Form, reply: Reply, named: str | None) -> float | None:
    """log p(A) - log p(B) of the token that says which is better.

    Where the server lists only one of the two among the likeliest tokens, the other is no likelier than the least likely one that is listed;
    that bound is taken if the reply names the first. None if neither way gives a number.
    """
    listed = _at_verdict(form, reply.tokens)
    found: dict[str, list[float]] = {"A": [], "B": []}
    for text, logprob in listed:
        label = re.match(r"[AB](?![A-Za-z0-9])", text)
        if label:
            found[label.group()].append(logprob)
    total = {label: _logsumexp(values) for label, values in found.items() if values}
    if len(total) == 1 and named in total:
        least = min(max(logprob, -2 * FARTHEST) for _, logprob in listed)
        total["A" if named == "B" else "B"] = min(least, total[named])
    if len(total) < 2 or all(math.isinf(value) for value in total.values()):
        return None
    return min(FARTHEST, max(-FARTHEST, total["A"] - total["B"]))


def expected(form: Form, reply: Reply, low: int, high: int) -> float | None:
    """sum n p(n) / sum p(n) over the scores n that the token which says the score could have been; None if that cannot be told."""
    found: dict[int, list[float]] = {}
    for text, logprob in _at_verdict(form, reply.tokens):
        digits = re.match(r"\d+", text)
        value = number(digits.group(), low, high) if digits else None
        if value is not None:
            found.setdefault(value, []).append(logprob)
    probs = {value: math.exp(_logsumexp(logprobs)) for value, logprobs in found.items()}
    if not sum(probs.values()) or (high >= 10 not in probs and probs.get(1, 0.0) > SPLIT):
        return None
    return sum(value * prob for value, prob in probs.items()) / sum(probs.values())


def pruned(form: Form, reply: Reply) -> Reply:
    """The same reply with the alternatives of the token that decides, and no others: a long rationale has thousands."""
    place = form.place("".join(token.text for token in reply.tokens))
    kept: list[Token] = []
    start = 0
    for token in reply.tokens:
        decides = place is not None and start <= place < start + len(token.text)
        start += len(token.text)
        if decides or not kept or kept[-1].alternatives:
            kept.append(token if decides else Token(text=token.text, alternatives={}))
        else:
            kept[-1] = Token(text=kept[-1].text + token.text, alternatives={})
    return replace(reply, tokens=tuple(kept))


def _at_verdict(form: Form, tokens: Sequence[Token]) -> list[tuple[str, float]]:
    """What could have stood where the verdict begins, each text from there on, with its log-prob."""
    place = form.place("".join(token.text for token in tokens))
    if place is None:
        return []
    start = 0
    for token in tokens:
        if place < start + len(token.text):
            before = token.text[: place - start]
            return [
                (text[len(before) :] if text.startswith(before) and before else text.lstrip(_AROUND), logprob)
                for text, logprob in token.alternatives.items()
            ]
        start += len(token.text)
    return []


def _object(text: str) -> Mapping[str, Any] | None:
    """A JSON object, whole and without a key that comes twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _logsumexp(values: Sequence[float]) -> float:
    most = max(values)
    return most if math.isinf(most) else most + math.log(sum(math.exp(value - most) for value in values))
