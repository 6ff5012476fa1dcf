"""Conservative DPO: "A Note on DPO with Noisy Preferences & Relationship to IPO"."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class Cdpo(Dpo):
    """DPO with a tenth of the labels assumed to be wrong: the optimum is z = logit(1 - label_smoothing) instead of infinity."""

    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
