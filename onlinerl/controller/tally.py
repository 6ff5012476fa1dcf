"""What the figures of a phase need to know about a group or a label, so that it need not stay in memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from onlinerl.types import Cost, Group, Label, Replies, Verdict
from onlinerl.types.rollouts import RejectReason

SHOWN = 300
"""Characters of what an oracle said that an error shows."""


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


class Lost:
    """What came of the questions of labels that were asked for, where a label is made of several; of each group the latest."""

    def __init__(self) -> None:
        self.replies = Replies()
        """Of all groups together."""
        self.kinds: set[str] = set()
        """Kinds of failure that there were, also of labels that were replaced."""
        self._groups: dict[str, Replies] = {}
        self._first: dict[str, str] = {}
        """What an oracle said of the first of each kind."""

    @property
    def groups(self) -> int:
        """Those that are made of several questions."""
        return len(self._groups)

    def add(self, label: Label) -> None:
        """And one more, in the place of an earlier one of this group; what the ledger knew was not asked for."""
        before = self._groups.pop(label.prompt_id, Replies())
        now = Replies() if label.reused_from is not None else label.result.replies
        failed = Counter(self.replies.failed) - Counter(before.failed) + Counter(now.failed)
        self.replies = Replies(asked=self.replies.asked - before.asked + now.asked, failed=dict(failed))
        if now.asked:
            self._groups[label.prompt_id] = now
        self.kinds |= now.failed.keys()
        words = (label.result.raw or "") if isinstance(label.result, Verdict) else label.result.message
        for kind in now.failed:
            said = next((line for line in words.splitlines() if kind in line), "")
            self._first.setdefault(kind, f"prompt {label.prompt_id!r}" + (f", {said[:SHOWN]}" if said else ""))

    def expected(self, groups: int) -> float:
        """About how many questions that many groups are made of."""
        return groups * self.replies.asked / self.groups if self.groups else 0.0

    def __str__(self) -> str:
        counts = Counter(self.replies.failed)
        top = counts.most_common(1)[0][0]
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"{self.replies.lost} of {self.replies.asked} replies failed ({kinds}); first {top}: {self._first[top]}"


def is_final(label: Label) -> bool:
    """Whether nobody asks again: a failure, and a verdict of which replies have failed, can still become better. What was taken over from
    elsewhere is as it is."""
    return isinstance(label.result, Verdict) and (not label.result.replies.lost or label.reused_from is not None)
