"""What the scores of the last visit to a prompt say of it."""

from __future__ import annotations

import numpy as np

from onlinerl.types import Objection
from onlinerl.types.selection import SelectionPlan, Visit


def pass_rate(visit: Visit, pass_score: float) -> float:
    """Share of the responses with at least this score."""
    return float(np.mean(np.asarray(visit.scores) >= pass_score))


def objection(plan: SelectionPlan, what: str, *, several: bool) -> Objection | None:
    """Why there would never be a last visit, or nothing to be seen in it.

    Args:
        plan: of the run.
        what: the key and its value that goes by the last visit.
        several: whether one response tells nothing.
    """
    if not plan.reuse:
        return Objection(
            field="prompts.reuse",
            cause=f"is false, so no prompt is sampled twice, and {what} goes by how it was judged the last time",
            fix="set prompts.reuse=true, or choose another selector",
        )
    if several and plan.samples_per_prompt < 2:
        return Objection(
            field="sampling.samples_per_prompt",
            cause=f"is 1, and {what} goes by how far the responses to a prompt are apart",
            fix="set it to 2 or more, or choose another selector",
        )
    return None
