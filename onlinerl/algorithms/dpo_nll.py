"""DPO with the likelihood of the winner: "Iterative Reasoning Preference Optimization", equation 1."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class DpoNll(Dpo):
    """f(z) - nll_coef * (log-prob per token of the chosen response).

    "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer" has `nll_norm: sum` with
    `nll_coef: 5e-5` at `beta: 0.01`.
    """

    nll_coef: float = Field(1.0, ge=0)
