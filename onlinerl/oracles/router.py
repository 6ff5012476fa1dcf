"""Asks a cheap oracle about everything, and an expensive one where the cheap one is not sure, as far as a budget goes.

Source: "Hybrid Preferences: Learning to Route Instances for Human vs. AI Feedback" (arXiv 2410.19133) for the idea of routing by expected
gain; here the gain is how undecided the cheap oracle is, and a share of the groups is asked at random, so that how often both agree can
be estimated without a bias to hard ones.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles._inner import Chooser, Inner, cost_of, failed, keep, kept, replies_of
from onlinerl.oracles._verdicts import as_preferences, sure
from onlinerl.protocols.keys import Resumable
from onlinerl.types import Failure, Query, Verdict, derive_seed

CHARACTERS_PER_TOKEN = 3
Why = Literal["sure", "not sure", "audit", "budget"]


class Router(Chooser):
    """Compares with one of two oracles. Their scores are of different scales, so it gives preferences alone."""

    cheap: Inner
    """Asked about every group."""
    expensive: Inner
    """Asked about those that `cheap` is not sure of; it decides them."""
    expensive_below: float = Field(0.3, ge=0, le=1)
    """How sure `cheap` has to be, as the mean of |2 P - 1| over the pairs of a group: 0 where all are even, 1 where all are certain. 0 never
    asks `expensive`, 1 always."""
    audit: float = Field(0.01, ge=0, le=1)
    """Share of the groups that `expensive` is asked about in any case, drawn by prompt and texts."""
    seed: int = 0
    budget_groups: Resumable[int | None] = Field(None, ge=0)
    """Groups that `expensive` may be asked about in a run, resumes included; None sets no limit. When it is used up, `cheap` decides."""
    budget_usd: Resumable[float | None] = Field(None, ge=0)
    """Dollars that it may cost. What a group may cost at most, with every further try, is set aside before it is asked."""

    _file: Path | None = PrivateAttr(None)
    _spent: dict[str, float] = PrivateAttr(default_factory=lambda: {"groups": 0, "usd": 0.0})
    _purse: Any = PrivateAttr(default_factory=threading.Lock)

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.budget_usd is not None and self.expensive.most_usd(1, 1, 2) is None:
            raise ConfigError(
                "is in dollars, and it is not known what `expensive` costs",
                field="oracle.budget_usd",
                fix="set oracle.expensive.price_per_million_tokens, or oracle.budget_groups instead",
            )
        return self

    @property
    def version(self) -> str:
        """Hash of both versions and of the rule. Budgets are no part of it: each verdict says who gave it."""
        return self._version(**self.model_dump(include={"expensive_below", "audit", "seed"}))

    @property
    def asks_as_needed(self) -> bool:
        """Unless `expensive` is asked always, or never."""
        always = self.expensive_below == 1 and self.budget_groups is None and self.budget_usd is None
        return not (always or self._cheap_alone(2)) or super().asks_as_needed

    def _cheap_alone(self, responses: int) -> bool:
        """Whether `expensive` is never asked about so many responses: one has nothing to be compared with."""
        return responses < 2 or (self.expensive_below == 0 and self.audit == 0)

    def requests(self, responses: int) -> int | None:
        """Of both, if `expensive` may be asked."""
        return self.cheap.requests(responses) if self._cheap_alone(responses) else super().requests(responses)

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float | None:
        """Of both, if `expensive` may be asked."""
        about = (prompt_tokens, response_tokens, responses)
        return self.cheap.most_usd(*about) if self._cheap_alone(responses) else super().most_usd(*about)

    def remember(self, folder: Path) -> None:
        """Keep there what was spent, so that a resume goes on with what is left.

        Raises:
            OracleError: if it cannot be read.
        """
        super().remember(folder)
        self._file = folder / "spent.json"
        if (said := kept(self._file)) is not None:  # a trial before this may have cost something too
            for key in self._spent:
                self._spent[key] += said[key]

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One Verdict of preferences per query, in order; a Failure where an oracle that was asked failed."""
        version = self.version if queries else ""
        first = self._ask("cheap", queries)
        reasons = [self._reason(query, said) for query, said in zip(queries, first, strict=True)]
        prices = {i: self._set_aside(queries[i]) for i, why in enumerate(reasons) if why in ("not sure", "audit")}
        asked = [i for i, price in prices.items() if price is not None]
        second = dict(zip(asked, self._ask("expensive", [queries[i] for i in asked]), strict=True))
        self._settle([(prices[i] or 0.0, second[i].cost.usd) for i in asked])
        results: list[Verdict | Failure] = []
        for i, cheap in enumerate(first):
            said = {"cheap": cheap} | ({"expensive": second[i]} if i in second else {})
            why: Why = "budget" if i in prices and i not in second else reasons[i]
            results.append(failed(said) or _decided(cast("dict[str, Verdict]", said), why, version))
        return results

    def _reason(self, query: Query, cheap: Verdict | Failure) -> Why:
        if isinstance(cheap, Failure) or len(query.responses) < 2:
            return "sure"  # a group that has failed is one, and a single response has nothing to be compared with
        if self.expensive_below == 1 or sure(cheap.matrix()) < self.expensive_below:
            return "not sure"
        texts = map(ascii, sorted(query.responses))
        drawn = (derive_seed("audit", self.seed, query.prompt.id, *texts) + 0.5) / 2**31 < self.audit
        return "audit" if drawn else "sure"

    def _set_aside(self, query: Query) -> float | None:
        """What asking may cost at most, in dollars, which is spent from now on; None if there is not so much left."""
        price = 0.0
        if self.budget_usd is not None:
            read = len(query.prompt.token_ids) or len(query.prompt.text) / CHARACTERS_PER_TOKEN
            longest = max(map(len, query.responses)) / CHARACTERS_PER_TOKEN
            once = self.expensive.most_usd(read, longest, len(query.responses)) or 0.0
            price = once * (1 + self.expensive.retries)
        with self._purse:
            if self.budget_groups is not None and self._spent["groups"] + 1 > self.budget_groups:
                return None
            if self.budget_usd is not None and self._spent["usd"] + price > self.budget_usd:
                return None
            self._spent["groups"] += 1
            self._spent["usd"] += price
            self._keep()
        return price

    def _settle(self, paid: Sequence[tuple[float, float]]) -> None:
        """What was set aside, and what it has really cost. After a kill the former stays: more may have been paid than is known."""
        if not paid:
            return
        with self._purse:
            self._spent["usd"] += sum(real - aside for aside, real in paid)
            self._keep()

    def _keep(self) -> None:
        if self._file is not None and (self.budget_groups is not None or self.budget_usd is not None):
            keep(self._file, self._spent)

    @property
    def remarks(self) -> Sequence[str]:
        """What is left, and what the inner oracles have to say."""
        left = [
            f"{limit - self._spent[key]:g} of {limit:g} {unit}"
            for key, limit, unit in (("groups", self.budget_groups, "groups"), ("usd", self.budget_usd, "dollars"))
            if limit is not None
        ]
        return [*([f"the expensive oracle may be asked for {' and '.join(left)} more"] if left else []), *super().remarks]


def _decided(said: dict[str, Verdict], why: Why, version: str) -> Verdict:
    """The verdict of the last one that was asked, as preferences, each with the temperature of who gave it."""
    source, verdict = list(said.items())[-1]
    note: dict[str, Any] = {"by": source, "because": why, "cheap_is_sure": round(sure(said["cheap"].matrix()), 4)}
    if source == "expensive":
        note["same_winners"] = _agreement(said["cheap"].matrix(), verdict.matrix())
    return replace(
        as_preferences(verdict),
        annotator=f"router:{source}:{verdict.annotator}",
        oracle_version=version,
        raw="\n".join(filter(None, (json.dumps(note), verdict.raw))),
        cost=cost_of(said),
        replies=replies_of(said),
    )


def _agreement(one: np.ndarray, other: np.ndarray) -> float | None:
    """Share of the pairs of which both name a winner that name the same one; None if there is no such pair."""
    upper = np.triu_indices(len(one), k=1)
    a, b = one[upper] - 0.5, other[upper] - 0.5
    both = (np.nan_to_num(a) != 0) & (np.nan_to_num(b) != 0)
    return float((a[both] * b[both] > 0).mean()) if both.any() else None
