"""Does a response have a form? A regular expression, as in the format rewards of TRL (`think_format_reward`) and verl."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_validator

from onlinerl.oracles import _verdicts
from onlinerl.protocols.keys import Seconds
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict


class Format(Oracle):
    """Scores 1 for a response that has the form, 0 for any other."""

    groups_per_call: int = Field(16, ge=1)  # asking again costs nothing
    pattern: str = Field(description="a regular expression", examples=[r"'<think>(?!.*<think>).*?</think>.*'"])
    """A regular expression; `.` takes line breaks too, and ^ and $ also stand for the ends of lines."""
    match: Literal["full", "anywhere"] = "full"
    """Whether the whole response has to be of this form, or only a part of it."""
    ignore_case: bool = False
    negate: bool = False
    """Whether the score is 1 where the expression does not match, e.g. for what must not be said."""
    min_length: int | None = Field(None, ge=0)
    """Shortest response that has the form, in characters."""
    max_length: int | None = Field(None, ge=0)
    """Longest one."""
    timeout_s: Seconds = 1.0
    """Longest search in one response, which is tried twice. An expression may take for ever on a text that was made for it: such a response is
    not judged, and counts towards `max_failed_labels`."""

    preference_temperature: float = Field(0.2, gt=0)
    """As for every oracle. 1 against 0 is no matter of taste: 0.2 makes that a probability of 0.993."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import regex

        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @cached_property
    def _compiled(self) -> Any:
        import regex  # it has deadlines, which `re` has not: that would stop every thread of this process

        flags = regex.DOTALL | regex.MULTILINE | (regex.IGNORECASE if self.ignore_case else 0)
        compiled = regex.compile(self.pattern, flags)
        return compiled.fullmatch if self.match == "full" else compiled.search

    @property
    def version(self) -> str:
        """Hash of the form."""
        said = self.model_dump(include={"pattern", "match", "ignore_case", "negate", "min_length", "max_length", "timeout_s"})
        said["late"] = "not judged"  # older versions gave 0
        return f"format-{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]}"

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict with K scores of 0 or 1 per query, in order."""
        return [self._judge(query) for query in queries]

    def _judge(self, query: Query) -> Verdict | Failure:
        started = time.perf_counter()
        found = [self._score(response) for response in query.responses]
        cost = Cost(calls=len(found), seconds=time.perf_counter() - started)
        return _verdicts.from_each(found, annotator="format", oracle_version=self.version, cost=cost)

    def _score(self, response: str) -> float | Failure:
        if len(response) < (self.min_length or 0) or len(response) > (
            len(response) if self.max_length is None else self.max_length
        ):
            return 0.0
        for _ in range(2):  # the machine may have been busy
            with contextlib.suppress(TimeoutError):
                found = self._compiled(response, timeout=self.timeout_s, concurrent=True)
                return float((found is None) == self.negate)
        return Failure(kind="timeout", message=f"not searched within {self.timeout_s:g} s, twice")
