"""Advantages, computed once per iteration over unpadded responses: without padding there is none to leak in. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def gae(rewards: np.ndarray, values: np.ndarray, *, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages A[T] and critic targets A + V [T] of one response; the value after the last token is 0.

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
    advantages = np.zeros_like(values)
    carried = 0.0
    for t in reversed(range(len(values))):
        carried = deltas[t] + gamma * lam * carried
        advantages[t] = carried
    return advantages, advantages + values


def whiten(parts: Sequence[np.ndarray], *, floor: float = 1e-6) -> list[np.ndarray]:
    """Shift and scale all tokens of all parts together to mean 0 and standard deviation 1.

    The standard deviation is floored, so that numerical dust around equal advantages is not blown up to unit variance.
    """
    if not parts:
        return []
    tokens = np.concatenate(parts)
    if tokens.size == 0:
        return list(parts)
    mean, std = tokens.mean(), max(float(tokens.std()), floor)
    return [(part - mean) / std for part in parts]


def group_advantages(rewards: Sequence[float], *, normalise: bool) -> np.ndarray:
    """A[K] = r - mean, divided by (std + 1e-6) if `normalise`; zeros where all rewards of the group are equal.

    The standard deviation is the UNBIASED one (K - 1): "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
    Models", section 4.1.2.

    Raises:
        ValueError: for fewer than two responses, which have no baseline.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group baseline needs at least 2 responses per prompt, got {len(rewards)}")
    centred = np.asarray(rewards, dtype=np.float64) - np.mean(rewards)
    std = unbiased_std(centred)
    if std < 1e-8:
        return np.zeros_like(centred)
    return centred / (std + 1e-6) if normalise else centred


def unbiased_std(values: np.ndarray) -> float:
    """Standard deviation with K - 1 in the denominator; 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
