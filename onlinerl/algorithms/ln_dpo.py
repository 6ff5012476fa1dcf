"""Length-normalized DPO: "The Hitchhiker's Guide to Human Alignment with *PO"."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class LnDpo(Dpo):
    """DPO on log-ratios per token, so that `beta` is DPO's times the mean length."""

    beta: float = Field(5.0, gt=0)
    length_norm: bool = True
