"""Flex-DPO: "3D-Properties: Identifying Challenges in DPO and Charting a Path Forward"."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class FlexDpo(Dpo):
    """DPO with z = beta D_w - beta_rejected D_l: a weaker push away from the rejected response, whose probability else collapses."""

    beta_rejected: float | None = Field(0.05, ge=0)
