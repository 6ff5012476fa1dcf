"""Only the prompts that are answered worst are sampled anew; the others are trained on once more with the responses that are there.

Source: "OPTune: Efficient Online Preference Tuning" (arXiv 2406.07657).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onlinerl.errors import ConfigError
from onlinerl.protocols.selection import Selector
from onlinerl.selection import _last_visit
from onlinerl.types import Objection, derive_seed
from onlinerl.types.selection import Pool, Selected, SelectionPlan, Visit

_TIE = 1e-6
"""Scores whose standard deviation is below are all alike."""


class Regenerate(Selector):
    """Takes the prompts that were trained on least, in the order that `shuffled` has where `prompts.per_iteration` divides their number. Of
    those that have responses, the share `rho` is sampled anew: first those whose responses are older than `max_age`, then those of lowest rank. The
    rest is trained on with its latest responses and what the oracle said of them.

    Where more than that share is too old, all of these are sampled anew. With `rho` 1 everything is, as with `shuffled`.
    """

    name: str = "regenerate"
    rho: float = Field(0.5, gt=0, le=1)
    """Share of the prompts with responses that is sampled anew in each iteration."""
    max_age: int = Field(2, ge=1)
    """In iterations: how long ago responses that are trained on once more may have been sampled."""
    rank: Literal["base", "raw"] = "base"
    """By what prompts are ranked: `base`, (mean score of the latest responses - mean of the first ones) / standard deviation of the first ones, which are the
    base model's where a prompt was first sampled in iteration 1; `raw`, the mean score of the latest ones, as the paper has it, though scores of a
    reward model are not comparable across prompts. Of equals chance decides; with `base` all are equal until responses have been
    sampled twice."""

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        fields = type(self).model_fields
        for key in ("max_age", "rank"):
            if self.rho == 1 and (value := getattr(self, key)) != fields[key].default:
                raise ConfigError(
                    f"is {value}, and with rho=1 everything is sampled anew, and nothing reads it",
                    field=f"selection.{key}",
                    fix="leave it out, or set selection.rho below 1",
                )
        return self

    @property
    def reads_scores(self) -> bool:
        """Unless there is nothing to rank."""
        return self.reuses

    @property
    def reads_first_visits(self) -> bool:
        """Where they are what the latest ones are compared with."""
        return self.reuses and self.rank == "base"

    @property
    def reuses(self) -> bool:
        """Unless everything is sampled anew."""
        return self.rho < 1

    def select(self, pool: Pool) -> list[Selected]:
        """As many as are asked for; with dynamic sampling each `prompts.per_iteration` of them for themselves."""
        asked = pool.asked
        key = {p.id: (asked.get(p.id, 0), derive_seed(pool.seed, asked.get(p.id, 0), p.id), p.id) for p in pool.open}
        ids = sorted(key, key=lambda prompt_id: key[prompt_id])[: pool.most]
        rounds = (ids[start : start + pool.per_iteration] for start in range(0, len(ids), pool.per_iteration))
        return [one for some in rounds for one in self._round(pool, some)]

    def _round(self, pool: Pool, ids: Sequence[str]) -> list[Selected]:
        there = {i: pool.visits[i] for i in ids if i in pool.visits}
        old = {i for i, visit in there.items() if pool.iteration - visit.sampled_in > self.max_age}
        ranks = self._ranks(pool, there)
        chance = {i: derive_seed(pool.seed, pool.iteration, "regenerate", i) for i in there}
        by_rank = sorted(there.keys() - old, key=lambda i: (ranks[i], chance[i], i))
        lowest = by_rank[: max(0, self._least(len(there)) - len(old))]
        again = old | set(lowest)

        def selected(prompt_id: str) -> Selected:
            if prompt_id not in there:
                known = "sampled anew: no verdict is known yet" if self.reuses else "sampled anew"
                reason = known if pool.asked.get(prompt_id) else "sampled for the first time"
                return Selected(prompt_id=prompt_id, probability=1.0, reason=reason)
            visit, reused_from = there[prompt_id], None
            if prompt_id in old:
                reason = f"sampled anew: its responses are {pool.iteration - visit.sampled_in} iterations old"
            elif prompt_id in again:
                reason = f"sampled anew: {self.rank} rank {ranks[prompt_id]:.3g}, among the lowest"
            else:
                reused_from = visit.sampled_in
                reason = f"responses of iteration {reused_from} once more: {self.rank} rank {ranks[prompt_id]:.3g}"
            return Selected(prompt_id=prompt_id, probability=1.0, reason=reason, reused_from=reused_from)

        return [selected(prompt_id) for prompt_id in ids]

    def _ranks(self, pool: Pool, there: Mapping[str, Visit]) -> dict[str, float]:
        """Of each prompt that has responses, low for those that are answered badly."""
        means = {i: float(np.mean(visit.scores)) for i, visit in there.items()}
        if self.rank == "raw":
            return means
        first = {i: np.asarray(pool.first_visits.get(i, visit).scores, np.float64) for i, visit in there.items()}
        stds = {i: float(scores.std()) for i, scores in first.items()}
        spread = [std for std in stds.values() if std >= _TIE]
        usual = float(np.median(spread)) if spread else 1.0  # for those whose first responses were judged all alike
        return {i: (means[i] - float(first[i].mean())) / (stds[i] if stds[i] >= _TIE else usual) for i in there}

    def _least(self, visited: int) -> int:
        """How many of so many prompts are sampled anew at least."""
        return math.ceil(round(self.rho * visited, 6))

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """Nothing would ever be reused, or nothing can be ranked."""
        if not self.reuses:
            return None
        what = f"selection.rank={self.rank}"
        if (problem := _last_visit.objection(plan, what, several=self.rank == "base")) is not None:
            return problem
        first, size = self._soonest(plan), len(plan.prompts)
        if first > self.max_age:
            again = f"a prompt comes again after {first} iterations or more"
            if 1 + plan.max_lag >= first:
                again = f"with schedule.max_lag={plan.max_lag} responses are {first} iterations old before it is known how they were judged"
            return Objection(
                field="selection.max_age",
                cause=f"is {self.max_age}, and {again}: no responses would ever be trained on once more",
                fix=f"set it to {first} or more"
                + (
                    f", or give the run fewer prompts than {size}, or prompts.per_iteration more"
                    if first > 1 + plan.max_lag
                    else ""
                ),
            )
        if plan.iterations <= first:
            return Objection(
                field="iterations",
                cause=f"is {plan.iterations}, and no responses could be trained on once more before iteration {first + 1}: "
                f"{plan.per_iteration} prompts of {size} are trained on in each",
                fix=f"set it to {first + 1} or more, or choose another selection.name",
            )
        return None

    @staticmethod
    def _soonest(plan: SelectionPlan) -> int:
        """After how many iterations a prompt may come again at the earliest, with it being known how its responses were judged."""
        return max(1 + plan.max_lag, len(plan.prompts) // (plan.per_iteration * plan.rounds))

    def most_sampled(self, plan: SelectionPlan) -> int:
        """Known where every iteration takes all prompts, and no other is sampled in the place of one. Up to the iteration in which the first responses
        become too old, and with `rho` from 0.5 on ever after, it is exact, if every group is judged."""
        size, iterations = plan.per_iteration, plan.iterations
        if not self.reuses or plan.rounds > 1 or size < len(plan.prompts):
            return super().most_sampled(plan)
        whole = min(iterations, 1 + plan.max_lag)
        young = max(0, min(iterations, 1 + self.max_age) - whole)
        # Too old is at most what was not sampled anew in the last iteration of which verdicts are known.
        later = max(self._least(size), size - self._least(size))
        return whole * size + young * self._least(size) + (iterations - whole - young) * later
