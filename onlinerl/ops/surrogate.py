"""Losses per token of the policy-gradient family. Axes: B rows, T response positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.kl import MAX_LOG_RATIO, bounded_exp, k3
from onlinerl.ops.logprobs import masked


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None) -> Tensor:
    """-min(rho A, clamp(rho, 1 - low, 1 + high) A) per element: "Proximal Policy Optimization Algorithms", equation 7.

    With `dual_clip` c > 1 the loss of a token with A < 0 is at most -c A, so that one huge ratio cannot dominate a batch:
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning".
    """
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """1/2 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) per element; without `clip` the plain squared error."""
    error = (values - returns).square()
    if clip is not None:
        near_old = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        error = torch.maximum(error, (near_old - returns).square())
    return 0.5 * error


def policy_loss(
    outputs: Outputs,
    batch: Batch,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    sampler_cap: float | None,
) -> tuple[Tensor, dict[str, Mean]]:
    """The clipped surrogate of each response token, [B, T], zero where the mask is false, and its metrics.

    With `sampler_cap` C each token is weighted by sg[min(exp(old - behaviour), C)], because the engine's probabilities differ from
    the learner's for the same weights: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".

    Raises:
        ValueError: if the batch lacks the old or the engine's log-probs, or advantages.
    """
    mask = batch.mask_BT
    logprobs, old = masked(outputs.logprobs_BT, mask), masked(batch.need("old_BT"), mask)
    advantages = masked(batch.need("advantages_BT"), mask)
    ratio = bounded_exp(logprobs - old)
    loss = clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    gap = old - masked(batch.need("behaviour_BT"), mask)
    metrics = {
        "clip_low": Mean.of((ratio < 1.0 - clip_low) & (advantages < 0), mask),
        "clip_high": Mean.of((ratio > 1.0 + clip_high) & (advantages > 0), mask),
        "kl_old": Mean.of(k3(logprobs - old), mask),  # how far the policy moved since the rollouts
        # More than a few says that the policy has left the samples: their ratios are no longer what they claim to be.
        "clamped": Mean.of((logprobs - old).abs() > MAX_LOG_RATIO, mask),
        # Unbiased for the entropy of the policy that sampled, at the sampling temperature: the tokens were drawn from it.
        "entropy_sampled": Mean.of(-old, mask),
        "sampler_gap": Mean.of(gap.abs(), mask),  # how much learner and engine disagree, in nats
        "zero_advantage": Mean.of((advantages == 0).all(dim=1), mask.any(dim=1)),  # rows that teach nothing
        "response_length": Mean.of(batch.lengths_B, mask.any(dim=1)),
    }
    if sampler_cap is not None:
        loss = loss * bounded_exp(gap).clamp(max=sampler_cap).detach()
        metrics["sampler_capped"] = Mean.of(gap > math.log(sampler_cap), mask)
    metrics["policy_loss"] = Mean.of(loss, mask)
    if outputs.entropy_BT is not None:
        metrics["entropy"] = Mean.of(masked(outputs.entropy_BT, mask), mask)
    return masked(loss, mask), metrics
