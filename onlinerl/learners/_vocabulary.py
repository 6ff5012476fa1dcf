"""Sums over the whole vocabulary for each token, of logits that exist for a moment. Axes: N response tokens, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onlinerl.families import LogitRule
from onlinerl.learners._logits import logits as fp32_logits


class TokenTerms(NamedTuple):
    """What a model says about each of N response tokens, [N] each; None what nobody asked for. A plain tuple: DeepSpeed looks into it."""

    logprobs: Tensor
    entropy: Tensor | None = None
    collision: Tensor | None = None
    reference_kl: Tensor | None = None


class FrozenStates(NamedTuple):
    """The states of a frozen model before each of N response tokens, and what makes logits of them. Nothing carries a gradient."""

    hidden_NH: Tensor
    weight_VH: Tensor
    """The output matrix, whole."""
    bias_V: Tensor | None
    rule: LogitRule

    def logits(self, start: int, end: int, temperature: float) -> Tensor:
        """Of the tokens from `start` to `end`, as the model's family rescales them, divided by `temperature`."""
        return rescale(fp32_logits(self.hidden_NH[start:end], self.weight_VH, self.bias_V), self.rule, temperature)


def rescale(logits_NV: Tensor, rule: LogitRule, temperature: float) -> Tensor:
    """Logits as the model's family rescales them, divided by `temperature`, in the memory that they are in."""
    if rule.scale != 1.0:
        logits_NV.mul_(rule.scale)
    if rule.cap is not None:
        logits_NV.div_(rule.cap).tanh_().mul_(rule.cap)
    return logits_NV if temperature == 1.0 else logits_NV.div_(temperature)


def collision(logits_NV: Tensor) -> Tensor:
    """log sum_v pi_v^2, [N], without gradient: 0 where one token is certain, -log V where all are equally probable."""
    return torch.logsumexp(2.0 * torch.log_softmax(logits_NV.detach(), dim=-1), dim=-1)


def kl_from(reference_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(reference || policy), [N], in nats: exactly 0 where the two are equal. Its gradient by the policy's logits is the difference of
    the probabilities, policy minus reference."""
    theirs_NV = torch.log_softmax(reference_NV, dim=-1)
    return (theirs_NV.exp() * (theirs_NV - torch.log_softmax(logits_NV, dim=-1))).sum(-1)
