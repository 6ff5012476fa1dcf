"""What is asked about given tokens, from the states before them: output matrix, softmax and sums over the vocabulary, piece by piece.

Where all tokens are one piece, its log-probs are kept for the backward pass. Of several, nothing with a vocabulary axis outlives its piece: the
backward pass computes the logits of each again. The gradient is made in the memory that they are in. Axes: N response tokens, H hidden, V
vocabulary, C tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onlinerl.families import LogitRule
from onlinerl.learners._logits import logits as fp32_logits
from onlinerl.learners._vocabulary import FrozenStates, TokenTerms, rescale

TABLES = 2
"""So many tables [C, V] in fp32 exist at a time; one more beside a reference, and one more where the family caps its logits."""


class Asked(NamedTuple):
    """What is asked, and how logits are made."""

    rule: LogitRule
    temperature: float
    entropy: bool
    collision: bool
    reference: FrozenStates | None
    size: int
    """Tokens of a piece."""


def token_terms(hidden_NH: Tensor, targets_N: Tensor, weight_VH: Tensor, bias_V: Tensor | None, asked: Asked) -> TokenTerms:
    """Of each token, from logits `hidden @ weight.T + bias` that are rescaled and divided by the temperature; fp32, or fp64 of fp64.

    Log-prob: log pi(target). Entropy: -sum_v pi_v log pi_v. Collision, without gradient: log sum_v pi_v^2. KL of the reference rho:
    sum_v rho_v (log rho_v - log pi_v). Gradients reach states, output matrix and bias, once: the backward pass uses up what it reads.
    """
    logprobs, entropy, collision, kl = _Terms.apply(hidden_NH, targets_N, weight_VH, bias_V, asked)  # type: ignore[no-untyped-call]
    return TokenTerms(logprobs, entropy, collision, kl)


def _logprobs(logits_CV: Tensor) -> Tensor:
    """The policy and the reference go the same way, so that equal logits give equal log-probs, to the last bit."""
    return torch.log_softmax(logits_CV, dim=-1)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, targets_N: Tensor, weight_VH: Tensor, bias_V: Tensor | None, asked: Asked
    ) -> tuple[Tensor | None, ...]:
        columns: list[list[Tensor]] = [[], [], [], []]
        kept: Tensor | None = None
        for start, end in _pieces(len(targets_N), asked.size):
            logits_CV = fp32_logits(hidden_NH[start:end], weight_VH, bias_V)
            logprobs_CV = _logprobs(rescale(logits_CV, asked.rule, asked.temperature))
            del logits_CV
            columns[0].append(logprobs_CV.gather(1, targets_N[start:end, None]).squeeze(1))
            if asked.entropy or asked.collision:
                table_CV = logprobs_CV.exp()
                if asked.collision:  # at least 1 / V, so that nothing vanishes
                    columns[2].append(2.0 * torch.linalg.vector_norm(table_CV, dim=-1).log())
                if asked.entropy:
                    columns[1].append(-table_CV.mul_(logprobs_CV).sum(dim=-1))
                del table_CV
            if asked.reference is not None:
                columns[3].append(_kl_from(asked.reference, start, end, asked.temperature, logprobs_CV))
            if len(targets_N) <= asked.size and asked.rule.cap is None:  # how steep a cap is cannot be read off log-probs
                kept = logprobs_CV
            del logprobs_CV
        found = tuple(torch.cat(column) if column else None for column in columns)
        ctx.save_for_backward(hidden_NH, targets_N, weight_VH, bias_V, found[1], kept)
        ctx.asked = asked
        ctx.set_materialize_grads(False)
        if found[2] is not None:
            ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, targets_N, weight_VH, bias_V, entropy_N, kept = ctx.saved_tensors
        needs_hidden, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        of_hidden = torch.zeros_like(hidden_NH) if needs_hidden else None
        of_weight = torch.zeros_like(weight_VH) if needs_weight else None
        of_bias = torch.zeros_like(bias_V) if needs_bias else None
        of_logprobs, of_entropy, _, of_kl = gradients
        for start, end in _pieces(len(targets_N), ctx.asked.size):
            upstream = _Upstream(*(None if g is None else g[start:end, None] for g in (of_logprobs, of_entropy, of_kl)))
            logprobs_CV, bend_CV = (
                (kept, None) if kept is not None else _again(hidden_NH[start:end], weight_VH, bias_V, ctx.asked)
            )
            slope_CV = _slope(
                logprobs_CV,
                bend_CV,
                targets_N[start:end, None],
                None if entropy_N is None else entropy_N[start:end, None],
                upstream,
                ctx.asked,
                start,
            )
            del logprobs_CV, bend_CV
            if of_bias is not None:
                of_bias.add_(slope_CV.sum(dim=0))
            slope_CV = slope_CV.to(weight_VH.dtype)
            if of_hidden is not None:
                of_hidden[start:end] = slope_CV @ weight_VH
            if of_weight is not None:
                of_weight.addmm_(slope_CV.t(), hidden_NH[start:end])
            del slope_CV
        return of_hidden, None, of_weight, of_bias, None


class _Upstream(NamedTuple):
    """Gradients by what was asked about the tokens of a piece, [C, 1]; None of what nobody made use of."""

    logprobs: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, count)) for start in range(0, count, size))


def _kl_from(reference: FrozenStates, start: int, end: int, temperature: float, logprobs_CV: Tensor) -> Tensor:
    """KL(reference || policy), [C]: exactly 0 where the two are equal."""
    theirs_CV = _logprobs(reference.logits(start, end, temperature))
    table_CV = theirs_CV.exp()
    return table_CV.mul_(theirs_CV.sub_(logprobs_CV)).sum(dim=-1)


def _again(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, asked: Asked) -> tuple[Tensor, Tensor | None]:
    """The log-probs of a piece, [C, V], and how steep the cap of the logits is, [C, V]: 1 - tanh^2; None without a cap."""
    z_CV = rescale(fp32_logits(hidden_CH, weight_VH, bias_V), asked.rule, asked.temperature)
    cap = None if asked.rule.cap is None else asked.rule.cap / asked.temperature
    bend_CV = None if cap is None else z_CV.div(cap).square_().neg_().add_(1.0)
    return _logprobs(z_CV), bend_CV


def _slope(
    logprobs_CV: Tensor,
    bend_CV: Tensor | None,
    targets_C1: Tensor,
    entropy_C1: Tensor | None,
    upstream: _Upstream,
    asked: Asked,
    start: int,
) -> Tensor:
    """The gradient by logits as the output matrix gives them, in the memory of `logprobs_CV`.

    By z, the logits that the softmax sees: of log pi(y) it is 1[v = y] - pi_v, of the entropy -pi_v (log pi_v + entropy), of the KL
    pi_v - rho_v.
    """
    factor_C1 = logprobs_CV.new_zeros(len(logprobs_CV), 1)
    if upstream.logprobs is not None:
        factor_C1 -= upstream.logprobs
    if upstream.kl is not None:
        factor_C1 += upstream.kl
    if upstream.entropy is None:
        slope_CV = logprobs_CV.exp_().mul_(factor_C1)
    else:
        assert entropy_C1 is not None, "it has a gradient"
        probs_CV = logprobs_CV.exp()
        slope_CV = logprobs_CV.add_(entropy_C1).mul_(-upstream.entropy).add_(factor_C1).mul_(probs_CV)
        del probs_CV
    if upstream.logprobs is not None:
        slope_CV.scatter_add_(1, targets_C1, upstream.logprobs.to(slope_CV.dtype))
    if upstream.kl is not None:
        assert asked.reference is not None, "it has a gradient"
        theirs_CV = _logprobs(asked.reference.logits(start, start + len(slope_CV), asked.temperature))
        slope_CV.sub_(theirs_CV.exp_().mul_(upstream.kl))
        del theirs_CV
    if bend_CV is not None:
        slope_CV.mul_(bend_CV)
    factor = asked.rule.scale / asked.temperature
    return slope_CV if factor == 1.0 else slope_CV.mul_(factor)
