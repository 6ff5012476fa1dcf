"""Prompts whose responses were judged most differently come most often.

Sources: "Qwen2.5 Technical Report", which trains first on the queries whose scores vary most; "Harnessing Mixed Offline Reinforcement Learning
Datasets via Trajectory Weighting" (arXiv 2306.13085) for the positive-sided variance.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.protocols.selection import Selector
from onlinerl.selection import _last_visit
from onlinerl.selection._draws import drawn
from onlinerl.types import Objection
from onlinerl.types.selection import Pool, Selected, SelectionPlan, Visit


class Variance(Selector):
    """Draws prompts without replacement in proportion to priority * decay^age + eps, the priority being that of the last visit and the age how many
    iterations ago that was. A prompt that was never judged has the highest priority of all, so that each is tried.
    """

    name: str = "variance"
    priority: Literal["std", "pass_rate", "positive_variance"] = "std"
    """`std` of the scores of a group; `pass_rate` p (1 - p), p being the share of responses with `pass_score` or more; `positive_variance`
    E[max(0, score - mean)^2]."""
    pass_score: float = Field(0.5, allow_inf_nan=False)
    """Of `pass_rate`."""
    decay: float = Field(0.9, gt=0, le=1)
    eps: float = Field(0.05, gt=0, allow_inf_nan=False)
    """In units of the priority: so much has a prompt whose responses were judged alike."""
    noise_std: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Standard deviation of repeated judgements of one and the same response, in units of the score: what that adds to the variance of a group is
    subtracted, for `std` and `positive_variance`."""

    @field_validator("pass_score")
    @classmethod
    def _of_pass_rate(cls, value: float, info: ValidationInfo) -> float:
        if value != cls.model_fields["pass_score"].default and info.data.get("priority") != "pass_rate":
            raise ValueError("only priority=pass_rate reads it")
        return value

    @field_validator("noise_std")
    @classmethod
    def _of_scores(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("priority") == "pass_rate":
            raise ValueError("priority=pass_rate does not read it")
        return value

    @property
    def reads_scores(self) -> bool:
        """Those of the last visit."""
        return True

    def select(self, pool: Pool) -> list[Selected]:
        """As many as are asked for."""
        known = {
            i: self._priority(visit) * self.decay ** (pool.iteration - visit.iteration) for i, visit in pool.visits.items()
        }
        new = max(known.values(), default=0.0)
        weights = {prompt.id: known.get(prompt.id, new) + self.eps for prompt in pool.open}

        def reason(prompt_id: str) -> str:
            visit = pool.visits.get(prompt_id)
            return "new" if visit is None else f"priority {known[prompt_id]:.3g}, judged in iteration {visit.iteration}"

        order = drawn(weights, pool.most, pool.seed, pool.iteration, "variance")
        return [Selected(prompt_id=i, probability=p, reason=reason(i)) for i, p in order]

    def _priority(self, visit: Visit) -> float:
        scores = np.asarray(visit.scores, np.float64)
        if self.priority == "pass_rate":
            p = _last_visit.pass_rate(visit, self.pass_score)
            return p * (1 - p)
        # What noise adds to the variance of a group about its own mean, and, if it is symmetric, half of that above the mean.
        noise = self.noise_std**2 * (1 - 1 / len(scores))
        if self.priority == "std":
            return float(np.sqrt(max(0.0, float(scores.var()) - noise)))
        above = np.maximum(0.0, scores - scores.mean())
        return max(0.0, float(np.mean(above**2)) - noise / 2)

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """No prompt is visited twice, or one response has no spread."""
        return _last_visit.objection(plan, "selection.name=variance", several=True)
