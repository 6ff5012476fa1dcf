"""Oracles of which the truth is known, to find out what an algorithm makes of it: a utility, preferences that go in a circle, a population
whose members want different things. Noise is `noisy` around one of them.

Sources: Bradley and Terry (1952) for the utility; "Nash Learning from Human Feedback" (arXiv 2312.00886), section 3, for preferences that no
utility has; "MaxMin-RLHF: Towards Equitable Alignment of Large Language Models with Diverse Human Preferences" (arXiv 2402.08925) for the
population.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from onlinerl.errors import ConfigError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict
from onlinerl.types.labels import induced

WORD = re.compile(r"\w+")


class Utility(BaseModel):
    """What a response is worth."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    words: dict[str, float] = Field(default_factory=dict)
    """Worth of each time that a word (in lower case) occurs."""
    per_word: float = 0.0
    """Worth of each word of the response, whichever it is."""

    def of(self, response: str) -> float:
        """The sum over its words."""
        said = WORD.findall(response.lower())
        return sum(self.words.get(word, 0.0) for word in said) + self.per_word * len(said)


class Group(Utility):
    """A part of a population."""

    share: float = Field(gt=0, le=1)
    """Of the population."""


class Synthetic(Oracle):
    """Judges by exactly one of `utility`, `cycle` and `population`."""

    groups_per_call: int = Field(16, ge=1)  # asking again costs nothing
    utility: Utility | None = None
    """Scores: {words: {good: 1.0, bad: -1.0}, per_word: 0.01}."""
    cycle: tuple[str, ...] = ()
    """Three or more words of which each beats the next, and the last one the first: [paper, rock, scissors]. A response is of the kind of
    the one that it says first; one that says none loses to any that does."""
    cycle_strength: float = Field(0.9, gt=0.5, le=1)
    """How probable it is that a word beats the next one. Words that are no neighbours are even."""
    population: dict[str, Group] = Field(default_factory=dict)
    """By name, groups with a utility each: P(i beats j) is the mean over the groups, by their share, of Bradley-Terry in each, with utilities in log-odds. Each group's
    utility is kept by its name beside the preferences."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        chosen = [key for key in ("utility", "cycle", "population") if getattr(self, key)]
        if len(chosen) != 1:
            cause = f"is given beside {chosen[0]}" if chosen else "is missing"
            fix = "leave one of them out" if chosen else "set one of oracle.utility, oracle.cycle and oracle.population"
            raise ConfigError(cause, field=f"oracle.{chosen[1] if chosen else 'utility'}", fix=fix)
        if self.cycle and (len(self.cycle) < 3 or len({*self.cycle}) < len(self.cycle)):
            raise ConfigError(
                "has to be three or more different words", field="oracle.cycle", fix="give e.g. [paper, rock, scissors]"
            )
        if self.population and abs(sum(group.share for group in self.population.values()) - 1) > 1e-6:
            raise ConfigError("has shares whose sum is not 1", field="oracle.population", fix="correct `share` of its groups")
        return self

    @property
    def version(self) -> str:
        """Hash of the truth."""
        said = json.dumps(self.model_dump(include={"utility", "cycle", "cycle_strength", "population"}), sort_keys=True)
        return f"synthetic-{hashlib.sha256(said.encode()).hexdigest()[:12]}"

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict per query, in order: K scores of a utility, K x K preferences of a cycle or a population."""
        return [self._judge(query) for query in queries]

    def _judge(self, query: Query) -> Verdict:
        started = time.perf_counter()
        scores = preferences = components = None
        if self.utility is not None:
            scores = tuple(self.utility.of(response) for response in query.responses)
        elif self.cycle:
            preferences = self._circle(query.responses)
        else:
            components = {
                name: tuple(group.of(response) for response in query.responses) for name, group in self.population.items()
            }
            mixed = sum(
                (group.share * induced(components[name], 1.0) for name, group in self.population.items()),
                np.zeros((len(query.responses),) * 2),
            )
            np.fill_diagonal(mixed, np.nan)
            preferences = tuple(map(tuple, mixed.tolist()))
        return Verdict(
            annotator="synthetic",
            oracle_version=self.version,
            scores=scores,
            preferences=preferences,
            components=components,
            cost=Cost(calls=len(query.responses), seconds=time.perf_counter() - started),
        )

    def _circle(self, responses: Sequence[str]) -> tuple[tuple[float, ...], ...]:
        kinds = [
            next((self.cycle.index(word) for word in WORD.findall(each.lower()) if word in self.cycle), None)
            for each in responses
        ]
        k = range(len(responses))
        return tuple(tuple(float("nan") if i == j else self._beats(kinds[i], kinds[j]) for j in k) for i in k)

    def _beats(self, one: int | None, other: int | None) -> float:
        if one is None or other is None:
            return 0.5 if one is other else self.cycle_strength if other is None else 1 - self.cycle_strength
        step = (other - one) % len(self.cycle)
        return self.cycle_strength if step == 1 else 1 - self.cycle_strength if step == len(self.cycle) - 1 else 0.5
