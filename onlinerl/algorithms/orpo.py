"""ORPO: "ORPO: Monolithic Preference Optimization without Reference Model", equation 6."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.algorithms._labels import UncertainLabels
from onlinerl.algorithms._modified import Modified
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.margins import logistic
from onlinerl.ops.preference import by_pair, sequence_logprobs
from onlinerl.protocols.algorithm import Reference, by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged
    from onlinerl.types.training import TrainItem

CERTAIN = -1e-6
"""Log-prob per token above which odds are infinite in single precision."""


class Orpo(UncertainLabels, Modified):
    """nll_coef * NLL(y_w) + lam f(o_w - o_l), o = log odds of the mean log-prob per token, without a reference.

    The likelihood is that of the response, or of the prompt too (`nll_on`). Over which tokens its mean is, says `nll_norm`.
    Not the paper's: `nll_norm`, batch_tokens in its code; with it a long chosen response counts for more than a short one.
    """

    nll_coef: float = Field(1.0, ge=0)
    nll_on: Literal["response", "sequence"] = "response"
    """`sequence`: the likelihood of `nll_target` with its prompt, all tokens but the first, as in two public codes. Log-probs are of responses, so
    that text is one more response to its first token, and costs a forward and backward pass of its own."""
    lam: float = Field(0.1, ge=0)
    """Weight of the odds ratio; `beta` in some libraries."""

    @by_knobs
    def needs(self) -> Needs:
        """Pairs."""
        return replace(super().needs, reference=False)

    @by_knobs
    def reference(self) -> Reference:
        """None."""
        return "none"

    def completed(self, judged: Judged, items: list[TrainItem]) -> list[TrainItem]:
        """With the text that is imitated, where the prompt is part of it."""
        made = super().completed(judged, items)
        return [_with_text(item) for item in made] if self.nll_on == "sequence" and self.nll_coef else made

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """The odds ratio's part, lam times p f(z) + (1 - p) f(-z); z is the log of the ratio."""
        mean_B = (sequence_logprobs(outputs, batch) / lengths(batch)).clamp(max=CERTAIN)
        won, lost = by_pair(mean_B - torch.log(-torch.expm1(mean_B)), batch)
        z_P = won - lost if self.margin_cap is None else (won - lost).clamp(max=self.margin_cap)
        return self.lam * logistic(z_P, self.label_probs(batch)), z_P, {}


def _with_text(item: TrainItem) -> TrainItem:
    """The pair with prompt and response of what is imitated as one response to the first token."""
    from onlinerl.types.training import TrainSequence

    target = item.sequences[item.nll or 0]
    text = (*target.prompt_ids, *target.response_ids)
    whole = TrainSequence(prompt_ids=text[:1], response_ids=text[1:], policy_version=None, source=target.source)
    return replace(item, sequences=(*item.sequences, whole), nll=len(item.sequences))
