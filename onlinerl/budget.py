"""What may still be paid for judgements: whoever asks reserves the most that a question can cost, and settles for what it has cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from onlinerl.errors import BudgetError
from onlinerl.types import Cost

LOOK_S = 0.02
"""How often somebody who waits looks whether others have settled."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run; None: no limit."""

    calls: int | None = None
    tokens: int | None = None
    usd: float | None = None

    def shares(self, cost: Cost) -> dict[str, float]:
        """A cost as a share of each limit, by name."""
        kinds: dict[str, float | None] = {"calls": self.calls, "tokens": self.tokens, "usd": self.usd}
        return {kind: getattr(cost, kind) / most for kind, most in kinds.items() if most is not None}

    def exceeded(self, cost: Cost) -> tuple[str, float] | None:
        """The first limit that is less than a cost, by name and value."""
        kinds: dict[str, float | None] = {"calls": self.calls, "tokens": self.tokens, "usd": self.usd}
        # A sum of many small prices may be off in its last digits.
        over = ((k, most) for k, most in kinds.items() if most is not None and getattr(cost, k) > most * (1 + 1e-12))
        return next(over, None)


class Account:
    """Of one run. Any thread may call it.

    Args:
        limits: what may be paid in all.
        spent: what was paid before.
    """

    def __init__(self, limits: Limits | None = None, spent: Cost | None = None) -> None:
        self.limits = limits or Limits()
        self.spent = spent or Cost()
        self._reserved: list[Cost] = []
        self._lock = threading.Lock()

    def reserve(self, most: Cost) -> bool:
        """Hold back what a question can cost at most; False while it may be too much because others have not settled yet.

        Raises:
            BudgetError: if it is too much whatever they settle for.
        """
        with self._lock:
            if (over := self.limits.exceeded(self.spent.plus(most))) is not None:
                raise self._reached(*over, most)
            held = self.spent
            for cost in [*self._reserved, most]:
                held = held.plus(cost)
            if self.limits.exceeded(held) is not None:
                return False
            self._reserved.append(most)
            return True

    def wait(self, most: Cost, over: Callable[[], bool]) -> bool:
        """`reserve`, as soon as it can be said; False if it is over before that.

        Raises:
            BudgetError: if it is too much.
        """
        while not self.reserve(most):
            if over():
                return False
            time.sleep(LOOK_S)
        return True

    def settle(self, most: Cost, paid: Cost) -> None:
        """In place of what was reserved, what it has cost."""
        with self._lock:
            self._reserved.remove(most)
            self.spent = self.spent.plus(paid)

    def spend(self, paid: Cost) -> None:
        """What nobody has reserved."""
        with self._lock:
            self.spent = self.spent.plus(paid)

    def _reached(self, kind: str, limit: float, most: Cost) -> BudgetError:
        unit = "$" if kind == "usd" else f" {kind}"
        spent, whole, next_one = (f"{n:.6g}{unit}" for n in (getattr(self.spent, kind), limit, getattr(most, kind)))
        return BudgetError(
            f"{spent} of {whole} are spent, and the next question may cost {next_one}",
            field=f"ledger.max_{kind}",
            fix=f"all that was paid for is kept: the same command goes on with a larger ledger.max_{kind}=..., of a run that is `onlinerl resume`",
        )


def largest(one: Cost, other: Cost) -> Cost:
    """The larger of the two in each respect."""
    names = ("calls", "usd", "tokens", "tokens_out")
    return replace(one, **{name: max(getattr(one, name), getattr(other, name)) for name in names})
