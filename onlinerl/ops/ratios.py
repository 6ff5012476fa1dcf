"""What is made of log-ratios of two policies, token by token: estimators of the KL, importance weights, the clipped surrogate.

"Approximating KL Divergence": k1 = d, k2 and k3 take d = log pi - log pi_ref in nats, any shape. As a penalty inside the reward use k1
(unbiased). As a term of the loss that is differentiated, the estimator's VALUE is not what counts: the gradient of k1 has expectation zero,
that of k2 is the gradient of KL(pi || ref), and that of k3 is the gradient of the opposite direction KL(ref || pi).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
MAX_LOG_RATIO = 20.0
"""exp() of more than this says nothing that a smaller number does not, and overflows soon after."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio clamped to [-20, 20]; no gradient outside."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def k2(d: Tensor) -> Tensor:
    """d^2 / 2: biased value, right gradient."""
    return 0.5 * d.square()


def k3(d: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased, never negative. The whole of d is clamped: clamping the exponential alone would leave the
    gradient +1 where d is very negative, which pushes d further down."""
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(-d) - 1.0 + d


def k3_plus(d: Tensor) -> Tensor:
    """Value of k3, gradient of k2: an unbiased figure whose gradient is that of KL(policy || reference)."""
    square = k2(d)
    return square - square.detach() + k3(d).detach()


def importance_weights(log_ratio_BT: Tensor, mode: Mode, band: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """w[B, T] without gradient, and where the ratio is below and above the band, bool[B, T].

    The ratio is that of a token, or the product of those of all tokens of a response (`sequence`): "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training". One outside of the band counts as the bound (`truncate`) or as 0 (`mask`): "Every Step Evolves:
    Scaling Reinforcement Learning for Trillion-Scale Thinking Model".

    Args:
        log_ratio_BT: log(learner / sampler) of each response token, 0 where there is none.
        mode: which ratio, and what becomes of one outside of the band.
        band: the smallest and the largest ratio that is used as it is; 0 is no lower bound.
    """
    log_ratio_BT, (low, high) = log_ratio_BT.detach(), band
    if mode.startswith("sequence"):
        # In fp64: how far a batch is padded decides in which order single precision would round.
        log_ratio_BT = log_ratio_BT.double().sum(dim=1, keepdim=True).expand_as(log_ratio_BT)
    ratio_BT = bounded_exp(log_ratio_BT)
    below_BT, above_BT = ratio_BT < low, ratio_BT > high
    if mode.endswith("truncate"):
        return ratio_BT.clamp(low, high), below_BT, above_BT
    return torch.where(below_BT | above_BT, 0.0, ratio_BT), below_BT, above_BT


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None) -> Tensor:
    """-min(rho A, clamp(rho, 1 - low, 1 + high) A) per element: "Proximal Policy Optimization Algorithms", equation 7.

    With `dual_clip` c > 1 the loss of a token with A < 0 is at most -c A, so that one huge ratio cannot dominate a batch:
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning".
    """
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss
