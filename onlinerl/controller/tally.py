"""What the figures of a phase need to know about a group or a label, so that it need not stay in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from onlinerl.types import Cost, Group, Label
from onlinerl.types.rollouts import RejectReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What was sampled for one prompt."""

    responses: int
    """Usable ones."""
    tokens: int
    """Of all of them."""
    cut: int
    """How many hit the length limit."""
    unique: float
    """Share of different texts; NaN without responses."""
    rejected: tuple[RejectReason, ...]
    """Why each of the others was thrown away."""

    @classmethod
    def of(cls, group: Group) -> Sampled:
        """About one group."""
        rollouts = [r for r in group.rollouts if r.source not in ("teacher", "carried")]  # nobody sampled those here
        return cls(
            responses=len(rollouts),
            tokens=sum(len(r.token_ids) for r in rollouts),
            cut=sum(r.finish_reason == "length" for r in rollouts),
            unique=len({r.text for r in rollouts}) / len(rollouts) if rollouts else math.nan,
            rejected=group.rejected,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Paid:
    """What some labels have cost."""

    cost: Cost = field(default_factory=Cost)
    """Of those that were asked for."""
    saved: Cost = field(default_factory=Cost)
    """What the others had cost when they were asked for."""

    def plus(self, label: Label) -> Paid:
        """And one more."""
        return Paid(cost=self.cost.plus(label.result.cost), saved=self.saved.plus(label.saved))
