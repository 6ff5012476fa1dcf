"""A mixture of sources in given shares.

Sources: "Scaling Data Diversity for Fine-Tuning Language Models in Human Alignment" (arXiv 2403.11124), which of a fixed number of labels would have
more responses to fewer prompts; "Unpacking DPO and PPO: Disentangling Best Practices for Learning from Preference Feedback".
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, field_validator

from onlinerl.protocols.selection import Selector
from onlinerl.selection._draws import uniform
from onlinerl.types import Objection, Prompt, derive_seed
from onlinerl.types.selection import Pool, Selected, SelectionPlan


class Mix(Selector):
    """Draws the source of each prompt in proportion to its weight, and then a prompt of it: one that was sampled least, in a random order.

    A source whose prompts are all sampled `max_visits` times is left out, and the others keep their proportions.
    """

    name: str = "mix"
    weights: Annotated[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], Field(min_length=1)]
    """By `source` of the prompts; every source that there is, 0 for those that are left out."""
    max_visits: int = Field(2, ge=1)
    """In how many iterations a prompt may be sampled at most; with `prompts.reuse=false` in one."""

    @field_validator("weights")
    @classmethod
    def _some(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("all weights are 0, so no prompt would ever be drawn")
        return weights

    def select(self, pool: Pool) -> list[Selected]:
        """As many as are asked for, or all that may still be sampled."""
        waiting = {source: self._queue(pool, prompts) for source, prompts in self._by_source(pool).items()}
        found: list[Selected] = []
        for place in range(pool.most):
            shares = {source: self.weights.get(source, 0.0) for source in sorted(waiting) if waiting[source]}
            total = math.fsum(shares.values())
            if total == 0:
                break
            source = _at(shares, total * uniform(pool.seed, pool.iteration, "source", place))
            prompt, alike = waiting[source].popleft()
            probability = shares[source] / total / alike
            found.append(Selected(prompt_id=prompt.id, probability=probability, reason=f"source {source}"))
        return found

    def _by_source(self, pool: Pool) -> dict[str, list[Prompt]]:
        found: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in pool.open:
            if pool.asked.get(prompt.id, 0) < self.max_visits:
                found[prompt.source].append(prompt)
        return found

    @staticmethod
    def _queue(pool: Pool, prompts: Sequence[Prompt]) -> deque[tuple[Prompt, int]]:
        """Prompts in the order in which they are taken, each with how many might have been taken in its place."""
        visits = {prompt.id: pool.asked.get(prompt.id, 0) for prompt in prompts}
        key = {p.id: (visits[p.id], derive_seed(pool.seed, "mix", visits[p.id], p.id), p.id) for p in prompts}
        left = Counter(visits.values())
        waiting: deque[tuple[Prompt, int]] = deque()
        for prompt in sorted(prompts, key=lambda each: key[each.id]):
            waiting.append((prompt, left[visits[prompt.id]]))
            left[visits[prompt.id]] -= 1
        return waiting

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """A source without a weight, a weight without a source, or too few prompts."""
        sizes = Counter(prompt.source for prompt in plan.prompts)
        if unknown := sorted(self.weights.keys() - sizes.keys()):
            return Objection(
                field="selection.weights",
                cause=f"names the source {unknown[0]!r}, and no training prompt is from there",
                fix=f"sources are {', '.join(map(repr, sorted(sizes)))}; a prompt says its own with the key `source`",
            )
        if silent := sorted(sizes.keys() - self.weights.keys()):
            return Objection(
                field="selection.weights",
                cause=f"does not say how often {sizes[silent[0]]} training prompts of the source {silent[0]!r} are drawn",
                fix=f"give {silent[0]!r} a weight, 0 to leave them out",
            )
        visits = self.max_visits if plan.reuse else 1
        size = sum(count for source, count in sizes.items() if self.weights[source] > 0)
        # Whichever sources chance takes first, each prompt that cannot come any more has cost as many samples as it may be sampled.
        before = (plan.iterations - 1) * plan.rounds * plan.per_iteration
        wanted = plan.per_iteration + math.ceil(before / visits)
        if size < wanted:
            rounds = f" of up to {plan.rounds} rounds" if plan.rounds > 1 else ""
            return Objection(
                field="selection.max_visits" if plan.reuse and size >= plan.per_iteration else "selection.weights",
                cause=f"{plan.iterations} iterations{rounds} of {plan.per_iteration} prompts, each sampled at most "
                f"{'once' if visits == 1 else f'{visits} times'}, may need {wanted}, and sources with a weight hold {size}",
                fix="lower iterations or prompts.per_iteration, add prompts or sources, or set prompts.reuse=true and a higher "
                "selection.max_visits",
            )
        return None


def _at(shares: dict[str, float], place: float) -> str:
    """The source in whose share a number below their sum lies."""
    for source, share in shares.items():
        place -= share
        if place < 0:
            return source
    return max(shares, key=lambda source: shares[source])  # by rounding
