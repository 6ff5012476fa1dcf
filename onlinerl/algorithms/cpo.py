"""CPO: "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation"."""

from __future__ import annotations

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo


class Cpo(Dpo):
    """f(beta (S_w - S_l)) - nll_coef * (log-prob per token of the chosen response), without a reference.

    Not the paper's: `nll_norm`, batch_tokens in its code; with it a long chosen response counts for more than a short one.
    """

    reference_free: bool = True
    nll_coef: float = Field(1.0, ge=0)
