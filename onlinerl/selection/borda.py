"""Prompts of which it is least certain how good the best response is.

Source: "Sample Efficient Preference Alignment in LLMs via Active Exploration" (AE-Borda), whose acquisition is the gap between an optimistic and a
pessimistic Borda score.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from onlinerl.protocols.selection import Selector
from onlinerl.selection import _last_visit
from onlinerl.selection._draws import drawn
from onlinerl.types import Objection
from onlinerl.types.selection import Pool, Selected, SelectionPlan, Visit


class Borda(Selector):
    """Draws `pool_mult` times as many prompts as are sampled, uniformly, and takes those with the largest acquisition: the highest optimistic Borda
    score among the responses of the last visit less the highest pessimistic one. What was never judged comes before what was. Where no response has a
    spread every acquisition is 0, and the choice is uniform.

    The paper samples new responses to every prompt of the pool, half of them from the reference, and measures the spread of their log-probs. Here the
    responses are those of the last visit, the opponents of each are the others among them, and mean and spread are those of the oracle's scores, so
    that nothing is sampled or asked for a prompt that is not taken. Large spreads are also those of prompts that nobody can judge: they come again
    until their responses agree.
    """

    name: str = "borda"
    pool_mult: int = Field(4, ge=2)
    """1 would leave nothing to choose from."""
    k: float = Field(2.0, gt=0, allow_inf_nan=False)
    """How many standard deviations a bound is from the mean."""
    beta: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Per unit of the score: how probable it is that one response beats another, sigmoid(beta * difference). The paper's, 0.1, is of log-probs."""

    @property
    def reads_scores(self) -> bool:
        """Those of the last visit."""
        return True

    @property
    def components(self) -> tuple[str, ...]:
        """How far the members of an ensemble are apart about each response."""
        return ("std",)

    def acquisition(self, visit: Visit) -> float:
        """max_a UCB(a) - max_a LCB(a), within [0, 1]. UCB(a) is the mean of sigmoid(beta ((m + k s)(a) - (m - k s)(a'))) over the other responses a',
        and LCB(a) has the bounds swapped; m is the score and s its standard deviation. 0 of a single response."""
        mean, spread = np.asarray(visit.scores), self.k * np.asarray(visit.components["std"])
        if len(mean) < 2:
            return 0.0
        high, low = mean + spread, mean - spread
        return max(0.0, float(_highest(high, low, self.beta) - _highest(low, high, self.beta)))

    def select(self, pool: Pool) -> list[Selected]:
        """As many as are asked for; with dynamic sampling each `prompts.per_iteration` of them from a pool of their own."""
        waiting = drawn({prompt.id: 1.0 for prompt in pool.open}, len(pool.open), pool.seed, pool.iteration, "borda")
        known = {i: self.acquisition(visit) for i, visit in pool.visits.items() if "std" in visit.components}
        found: list[Selected] = []
        while waiting and len(found) < pool.most:
            size = min(pool.per_iteration, pool.most - len(found))
            some, later = waiting[: self.pool_mult * pool.per_iteration], waiting[self.pool_mult * pool.per_iteration :]
            some.sort(key=lambda one: -known.get(one[0], math.inf))  # stable: of equals those that were drawn first
            found += (Selected(prompt_id=i, probability=p, reason=_reason(i, known, pool)) for i, p in some[:size])
            waiting = [*some[size:], *later]
        return found

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """No prompt is visited twice, one response has no opponent, or all prompts are taken in every iteration."""
        found = _last_visit.objection(plan, "selection.name=borda", several=True)
        if found is None and plan.per_iteration >= len(plan.prompts):
            return Objection(
                field="prompts.per_iteration",
                cause=f"is {plan.per_iteration}, and there are {len(plan.prompts)} training prompts: nothing is left to choose",
                fix="lower it, or choose another selector",
            )
        return found


def _highest(ours: np.ndarray, theirs: np.ndarray, beta: float) -> np.floating:
    """The highest Borda score over the responses, whose bounds are `ours` for themselves and `theirs` as opponents."""
    with np.errstate(over="ignore"):  # a huge gap saturates at 0 or 1, which is what it means
        beats = 1.0 / (1.0 + np.exp(-beta * (ours[:, None] - theirs[None, :])))
    np.fill_diagonal(beats, 0.0)
    highest: np.floating = beats.sum(axis=1).max() / (len(ours) - 1)
    return highest


def _reason(prompt_id: str, known: dict[str, float], pool: Pool) -> str:
    if prompt_id not in known:
        return "new"
    return f"acquisition {known[prompt_id]:.3g}, judged in iteration {pool.visits[prompt_id].iteration}"
