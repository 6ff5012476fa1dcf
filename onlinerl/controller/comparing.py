"""How an oracle that compares decides: whether it is the place, the length or the text."""

from __future__ import annotations

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

    @classmethod
    def of(cls, group: Group, verdict: Verdict) -> Compared:
        """From the cells as they were returned."""
        raw = np.array(verdict.preferences, dtype=np.float64)
        np.fill_diagonal(raw, np.nan)
        asked = ~np.isnan(raw)
        lengths = np.array([len(rollout.text) for rollout in group.rollouts])
        longer = (lengths[:, None] > lengths[None, :]) & ~np.isnan(verdict.matrix())
        return cls(
            flips=int(verdict.disagreements().sum()) // 2,
            both_orders=int((asked & asked.T).sum()) // 2,
            first_wins=_wins(raw[asked]),
            comparisons=int(asked.sum()),
            longer_wins=_wins(verdict.matrix()[longer]),
            unequal=int(longer.sum()),
        )


def _wins(probs: np.ndarray) -> float:
    return float((probs > 0.5).sum() + (probs == 0.5).sum() / 2)
