"""How an oracle decides: whether it is the place, the length or the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onlinerl.types import Group, Verdict


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
        return cls(
            flips=int(verdict.disagreements().sum()) // 2 if compares else 0,
            both_orders=int((asked & asked.T).sum()) // 2,
            first_wins=_wins(raw[asked]),
            comparisons=int(asked.sum()),
            longer_wins=_wins(matrix[longer]),
            unequal=int(longer.sum()),
            ties=int((known == 0.5).sum()),
            pairs=int((~np.isnan(known)).sum()),
        )


def _wins(probs: np.ndarray) -> float:
    return float((probs > 0.5).sum() + (probs == 0.5).sum() / 2)
