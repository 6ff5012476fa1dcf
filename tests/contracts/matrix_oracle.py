"""An oracle that only compares, with everything that a matrix may hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Query, Verdict

NAN = float("nan")


class Referee(Oracle):
    """Prefers the response with more letters a. Says nothing about one with the word dull, and prefers the response shown first.

    Responses with equally many letters a are ties; some pairs are asked in one order only.
    """

    @property
    def version(self) -> str:
        """It never changes."""
        return "referee"

    def judge(self, queries: Sequence[Query]) -> list[Verdict]:
        """One K x K matrix per query."""
        return [
            Verdict(
                annotator="referee",
                oracle_version=self.version,
                preferences=tuple(
                    tuple(cell(i, j, query.responses) for j in range(len(query.responses))) for i in range(len(query.responses))
                ),
                uncertainty=((0.0,) * len(query.responses),) * len(query.responses),
                cost=Cost(calls=len(query.responses) ** 2),
            )
            for query in queries
        ]


def cell(i: int, j: int, responses: Sequence[str]) -> float:
    """P(i beats j) with i shown first."""
    one, other = responses[i], responses[j]
    if i == j or "dull" in one or "dull" in other:
        return NAN
    if one > other and (len(one) + len(other)) % 2:
        return NAN  # asked in the other order only
    gap = one.count("a") - other.count("a")
    bias = (
        0.1 if (len(one) + len(other)) % 2 == 0 else 0.0
    )  # where one order alone was asked there is nothing to cancel it with
    return min(1.0, 1 / (1 + math.exp(-gap)) + bias)
