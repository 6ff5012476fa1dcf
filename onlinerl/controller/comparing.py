"""How an oracle decides: whether it is the place, the length or the text, and whether its preferences go in circles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from onlinerl.types import Group, Verdict, derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Of one group."""

    flips: int
    """Pairs whose two orders name different winners."""
    both_orders: int
    """Pairs that were compared in both orders."""
    first_wins: float
    """Comparisons won by the response shown first; a tie is half."""
    comparisons: int
    longer_wins: float
    """Pairs in which the longer response is preferred; a tie is half."""
    unequal: int
    """Pairs with an opinion whose responses differ in length (characters)."""
    ties: int
    """Pairs with an opinion that says neither."""
    pairs: int
    """With an opinion."""
    circles: int
    """Triples of responses of which each beats another one; 0 where not all pairs were compared."""
    triples: int
    """All of them; 0 where not all pairs were compared."""

    @classmethod
    def of(cls, group: Group, verdict: Verdict) -> Compared:
        """From the cells as they were returned."""
        return cls.of_texts([rollout.text for rollout in group.rollouts], verdict)

    @classmethod
    def of_texts(cls, texts: Sequence[str], verdict: Verdict) -> Compared:
        """The same of the responses; where there are scores only, nothing was shown first."""
        k, compares = len(texts), verdict.preferences is not None
        raw = np.array(verdict.preferences, dtype=np.float64) if compares else np.full((k, k), np.nan)
        np.fill_diagonal(raw, np.nan)
        asked, matrix = ~np.isnan(raw), np.array(verdict.matrix())
        lengths = np.array([len(text) for text in texts])
        longer = (lengths[:, None] > lengths[None, :]) & ~np.isnan(matrix)
        known = matrix[np.triu_indices(k, 1)]
        whole = compares and not np.isnan(known).any()
        return cls(
            flips=int(verdict.disagreements().sum()) // 2 if compares else 0,
            both_orders=int((asked & asked.T).sum()) // 2,
            first_wins=_wins(raw[asked]),
            comparisons=int(asked.sum()),
            longer_wins=_wins(matrix[longer]),
            unequal=int(longer.sum()),
            ties=int((known == 0.5).sum()),
            pairs=int((~np.isnan(known)).sum()),
            circles=circles(matrix, "".join(texts)) if whole else 0,
            triples=comb(k, 3) if whole else 0,
        )


def _wins(probs: np.ndarray) -> float:
    return float((probs > 0.5).sum() + (probs == 0.5).sum() / 2)


def circles(matrix: np.ndarray, seed: str = "") -> int:
    """How many triples of K responses go in a circle, from P(i beats j) [K, K]. Ties are broken by a coin that `seed` throws.

    Of a tournament, C(K, 3) - sum_i C(wins_i, 2): none for scores, a quarter of the triples for coins.
    """
    size = len(matrix)
    wins = [0] * size
    for i in range(size):
        for j in range(i + 1, size):
            coin = matrix[i, j] == 0.5 and derive_seed("circle", seed, i, j) % 2 == 0
            wins[i if matrix[i, j] > 0.5 or coin else j] += 1
    return comb(size, 3) - sum(comb(count, 2) for count in wins)
