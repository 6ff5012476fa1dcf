"""Easy prompts first.

Source: "Curry-DPO: Enhancing Alignment using Curriculum Learning & Ranked Preferences" (arXiv 2403.07230), for the order from large gaps to small
ones; there it is that of the pairs of one prompt.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.protocols.selection import Selector
from onlinerl.selection import _last_visit
from onlinerl.selection._draws import drawn
from onlinerl.types import Objection, derive_seed
from onlinerl.types.selection import Pool, Selected, SelectionPlan, Visit


class Curriculum(Selector):
    """Draws uniformly, without replacement, from the easiest prompts: a share of all that grows from `first_quantile` in iteration 1 to
    `last_quantile` in iteration `full_at`, and stays there. Where these are too few, the next easiest follow. What is drawn is put into order, easy first; with
    dynamic sampling each `prompts.per_iteration` of them.

    A prompt that was not judged yet counts as harder than half of those that were.
    """

    name: str = "curriculum"
    by: Literal["pass_rate", "gap", "column"] = "pass_rate"
    """What is hard: `pass_rate`, a small share of responses with `pass_score` or more at the last visit; `gap`, a small distance between the best score
    and the worst one of the last visit; `column`, a large `difficulty` of the prompt in the data."""
    pass_score: float = Field(0.5, allow_inf_nan=False)
    """Of `pass_rate`."""
    first_quantile: float = Field(0.3, gt=0, le=1)
    last_quantile: float = Field(1.0, gt=0, le=1)
    full_at: int = Field(3, ge=1)
    """It is no share of `iterations`, which a resume may raise: the pace of a run must not change then."""

    @field_validator("pass_score")
    @classmethod
    def _of_pass_rate(cls, value: float, info: ValidationInfo) -> float:
        if value != cls.model_fields["pass_score"].default and info.data.get("by") != "pass_rate":
            raise ValueError("only by=pass_rate reads it")
        return value

    @field_validator("last_quantile")
    @classmethod
    def _grows(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("first_quantile", 0.0):
            raise ValueError("it is below first_quantile, and the share of prompts grows")
        return value

    @property
    def reads_scores(self) -> bool:
        """Unless the data say what is hard."""
        return self.by != "column"

    def quantile(self, iteration: int) -> float:
        """Share of the prompts that an iteration draws from."""
        done = 1.0 if self.full_at == 1 else min(1.0, (iteration - 1) / (self.full_at - 1))
        return self.first_quantile + (self.last_quantile - self.first_quantile) * done

    def select(self, pool: Pool) -> list[Selected]:
        """As many as are asked for and there are."""
        hard = self._difficulties(pool)
        # Those that are as hard as each other stand in a random order, so that where the share ends does not depend on their names.
        seed = (pool.seed, pool.iteration, "curriculum")
        order = sorted(hard, key=lambda i: (hard[i], derive_seed(*seed, "tie", i), i))
        share = math.ceil(round(self.quantile(pool.iteration) * len(order), 6))
        easy, may = set(order[:share]), {prompt.id for prompt in pool.open}
        taken = drawn({i: 1.0 for i in order if i in easy and i in may}, pool.most, *seed)
        harder = [i for i in order if i not in easy and i in may][: pool.most - len(taken)]
        found = [
            *(Selected(prompt_id=i, probability=p, reason=self._reason(pool, i, hard[i])) for i, p in taken),
            *(Selected(prompt_id=i, probability=1.0, reason=f"{self._reason(pool, i, hard[i])}, next") for i in harder),
        ]
        place = {i: n for n, i in enumerate(order)}
        rounds = (found[start : start + pool.per_iteration] for start in range(0, len(found), pool.per_iteration))
        return [one for some in rounds for one in sorted(some, key=lambda each: place[each.prompt_id])]

    def _difficulties(self, pool: Pool) -> dict[str, float]:
        """Of all prompts."""
        if self.by == "column":
            return {prompt.id: math.nan if prompt.difficulty is None else prompt.difficulty for prompt in pool.prompts}
        known = {prompt_id: self._difficulty(visit) for prompt_id, visit in pool.visits.items()}
        middle = float(np.median([*known.values()])) if known else 0.0
        return {prompt.id: known.get(prompt.id, middle) for prompt in pool.prompts}

    def _difficulty(self, visit: Visit) -> float:
        if self.by == "pass_rate":
            return 1 - _last_visit.pass_rate(visit, self.pass_score)
        return min(visit.scores) - max(visit.scores)

    def _reason(self, pool: Pool, prompt_id: str, difficulty: float) -> str:
        visit = pool.visits.get(prompt_id)
        if self.by == "column":
            return f"difficulty {difficulty:.3g}"
        return "new" if visit is None else f"difficulty {difficulty:.3g}, judged in iteration {visit.iteration}"

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """Nothing says what is hard."""
        if self.by != "column":
            return _last_visit.objection(plan, f"selection.by={self.by}", several=self.by == "gap")
        lacking = [prompt for prompt in plan.prompts if prompt.difficulty is None]
        if lacking:
            return Objection(
                field="selection.by",
                cause=f"is column, and {len(lacking)} of {len(plan.prompts)} training prompts have no `difficulty`; the first is {lacking[0].id!r}",
                fix='add "difficulty": 0.5 to each line, name its column with prompts.columns.difficulty (prompts.name=dataset), or choose '
                "selection.by=pass_rate",
            )
        return None
