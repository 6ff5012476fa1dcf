"""What a critic is good for, and what it learns from."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def gae(rewards: np.ndarray, values: np.ndarray, *, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages A[T] and critic targets A + V [T] of one unpadded response; the value after the last token is 0.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}: "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", equations 11 to 16.

    Args:
        rewards: r[T], the reward of emitting token t.
        values: V[T], the value of the state BEFORE token t.
        gamma: discount.
        lam: 1 is the Monte-Carlo return minus the value, 0 the one-step temporal difference.

    Raises:
        ValueError: if the lengths differ.
    """
    if rewards.shape != values.shape:
        raise ValueError(f"{len(rewards)} rewards but {len(values)} values")
    values = values.astype(np.float64)
    following = np.append(values[1:], 0.0)[: len(values)]
    deltas = rewards + gamma * following - values
    decay = gamma * lam
    backwards = [*accumulate(deltas[::-1].tolist(), lambda carried, delta: delta + decay * carried, initial=0.0)]
    advantages = np.array(backwards[:0:-1], np.float64)
    return advantages, advantages + values


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """1/2 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) per element; without `clip` the plain squared error."""
    error = (values - returns).square()
    if clip is not None:
        near_old = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        error = torch.maximum(error, (near_old - returns).square())
    return 0.5 * error
