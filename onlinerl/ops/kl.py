"""Per-token estimators of KL(policy || reference) from one sampled token: "Approximating KL Divergence" (k1 = d, k2, k3).

All take d = log pi - log pi_ref in nats, any shape. As a penalty inside the reward use k1 (unbiased). As a term of the loss that is
differentiated, the estimator's VALUE is not what counts: the gradient of k1 has expectation zero, that of k2 is the gradient of
KL(pi || ref), and that of k3 is the gradient of the opposite direction KL(ref || pi).
"""

from __future__ import annotations

import torch
from torch import Tensor

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
