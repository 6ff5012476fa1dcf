"""ORPO: "ORPO: Monolithic Preference Optimization without Reference Model", equation 6."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._labels import UncertainLabels
from onlinerl.algorithms._modified import Modified
from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.preference import by_pair, logistic, sequence_logprobs
from onlinerl.protocols.algorithm import Needs, Reference, by_knobs

CERTAIN = -1e-6
"""Log-prob per token above which odds are infinite in single precision."""


class Orpo(UncertainLabels, Modified):
    """nll_coef * NLL(y_w) + lam f(o_w - o_l), o = log odds of the mean log-prob per token, without a reference.

    The likelihood is that of the response; two public codes include the prompt. Over which tokens its mean is, says `nll_norm`.
    Not the paper's: `nll_norm`, batch_tokens in its code; with it a long chosen response counts for more than a short one.
    """

    nll_coef: float = Field(1.0, ge=0)
    lam: float = Field(0.1, ge=0)
    """Weight of the odds ratio; `beta` in some libraries."""

    @by_knobs
    def needs(self) -> Needs:
        """Pairs."""
        return super().needs.model_copy(update={"reference": False})

    @by_knobs
    def reference(self) -> Reference:
        """None."""
        return "none"

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """The odds ratio's part, lam times p f(z) + (1 - p) f(-z); z is the log of the ratio."""
        mean_B = (sequence_logprobs(outputs, batch) / lengths(batch)).clamp(max=CERTAIN)
        won, lost = by_pair(mean_B - torch.log(-torch.expm1(mean_B)), batch)
        z_P = won - lost if self.margin_cap is None else (won - lost).clamp(max=self.margin_cap)
        return self.lam * logistic(z_P, self.label_probs(batch)), z_P, {}
