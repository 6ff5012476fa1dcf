"""SimPO: "SimPO: Simple Preference Optimization with a Reference-Free Reward", equation 6."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class Simpo(Dpo):
    """f(beta (Sbar_w - Sbar_l - gamma_beta_ratio)), Sbar the log-prob per token: no reference model is loaded.

    Nothing holds the policy where it began, so learning rates are low: the paper's are 3e-7 to 1e-6.
    """

    beta: float = Field(2.0, gt=0)
    """2 to 2.5 in the paper, up to 10."""
    reference_free: bool = True
    length_norm: bool = True
    gamma_beta_ratio: float = 0.5
