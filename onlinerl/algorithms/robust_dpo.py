"""Robust DPO: "Provably Robust DPO: Aligning Language Models with Noisy Feedback"."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class RobustDpo(Dpo):
    """[(1 - e) f(z) - e f(-z)] / (1 - 2e): what DPO's loss is on average over labels of which a share e = flip_rate was flipped.

    Not the paper's: `margin_cap`, null there; the loss falls without end as z grows.
    """

    margin_cap: float | None = Field(10.0, gt=0)
    flip_rate: float = Field(0.1, ge=0, lt=0.5)
