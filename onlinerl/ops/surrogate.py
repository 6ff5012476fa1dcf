"""The clipped surrogate of the policy-gradient family."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None) -> Tensor:
    """-min(rho A, clamp(rho, 1 - low, 1 + high) A) per element: "Proximal Policy Optimization Algorithms", equation 7.

    With `dual_clip` c > 1 the loss of a token with A < 0 is at most -c A, so that one huge ratio cannot dominate a batch:
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning".
    """
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - low, 1.0 + high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss
