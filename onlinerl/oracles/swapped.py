"""Asks another oracle about the responses in their order and in the reverse one: what the order does to its verdict is averaged out and
shown as uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from onlinerl.oracles import _verdicts
from onlinerl.oracles._inner import Inner, OnBase, failed
from onlinerl.types import Failure, Query, Verdict


class Swapped(OnBase):
    """The mean of two verdicts of one oracle, about the responses as they stand and in the reverse order.

    For an oracle that may go by the place at which a response stands: one that sees all of them at once, or that is asked about each
    pair in one order. How far the two verdicts disagree is the uncertainty: 0 for an oracle that reads texts alone.
    """

    base: Inner
    """The oracle that is asked: {name: judge_score, listwise: true, ...}."""

    @property
    def gives_uncertainty(self) -> bool:
        """Of the two orders."""
        return True

    @property
    def version(self) -> str:
        """Hash of that of `base`."""
        return self._version()

    def requests(self, responses: int) -> int | None:
        """Twice those of `base`; a single response has one order."""
        once = super().requests(responses)
        return once if once is None or responses < 2 else 2 * once

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float | None:
        """Twice that of `base`."""
        once = super().most_usd(prompt_tokens, response_tokens, responses)
        return once if once is None or responses < 2 else 2 * once

    def recorded(self, answers: Sequence[tuple[Query, Verdict | Failure]]) -> None:
        """In both orders."""
        super().recorded([*answers, *((_turned(query), result) for query, result in answers)])

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One result per query, in order; a Failure if either order failed."""
        version = self.version if queries else ""
        turned = [_turned(query) for query in queries if len(query.responses) > 1]
        said = iter(self._ask("base", [*queries, *turned]))
        forward = [next(said) for _ in queries]
        backward = [next(said) if len(query.responses) > 1 else first for query, first in zip(queries, forward, strict=True)]
        results: list[Verdict | Failure] = []
        for first, second in zip(forward, backward, strict=True):
            both = {"base": first, "base, in the reverse order": second} if second is not first else {"base": first}
            results.append(failed(both) or _mean(cast(Verdict, first), cast(Verdict, second), version))
        return results


def _turned(query: Query) -> Query:
    return replace(query, responses=query.responses[::-1])


def _mean(first: Verdict, second: Verdict, version: str) -> Verdict:
    """Of a verdict and of one about the same responses in the reverse order."""
    cost, replies = first.cost, first.replies
    if second is not first:
        cost, replies = cost.plus(second.cost), replies.plus(second.replies)
        second = _verdicts.turned(second)
    scores = _middle(first.scores, second.scores)
    unknown = () if scores is None else tuple(np.flatnonzero(np.isnan(scores)).tolist())
    shared = (first.components or {}).keys() & (second.components or {}).keys()
    components = {
        name: tuple(np.mean([(first.components or {})[name], (second.components or {})[name]], axis=0).tolist())
        for name in first.components or {}
        if name in shared
    }
    preferences, log_odds = _cells(first.preferences, second.preferences), _cells(first.log_odds, second.log_odds)
    return Verdict(
        annotator=f"swapped:{first.annotator}",
        oracle_version=version,
        scores=scores,
        unjudged=unknown,
        preferences=preferences,
        log_odds=None if preferences is None else log_odds,
        on_disagree=first.on_disagree,
        uncertainty=_verdicts.nats_of([first.matrix(), second.matrix()]),
        components=components or None,
        raw="\n".join(filter(None, (first.raw, second.raw))) or None,
        cost=cost,
        replies=replies,
    )


def _middle(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if one is None or other is None:
        return None
    mean: tuple[float, ...] = tuple(np.mean([one, other], axis=0).tolist())
    return mean


def _cells(
    one: tuple[tuple[float, ...], ...] | None, other: tuple[tuple[float, ...], ...] | None
) -> tuple[tuple[float, ...], ...] | None:
    """The mean of what both asked, else the one that there is."""
    if one is None or other is None:
        return None
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return tuple(map(tuple, np.where(np.isnan(a), b, np.where(np.isnan(b), a, (a + b) / 2)).tolist()))
