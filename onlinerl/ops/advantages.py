"""Advantages against the other responses of a group. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_advantages(rewards: Sequence[float], *, normalise: bool = False) -> np.ndarray:
    """A[K] = r - mean, divided by (std + 1e-6) if `normalise`; zeros where all rewards of the group are equal.

    The standard deviation is the UNBIASED one (K - 1): "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
    Models", section 4.1.2.

    Raises:
        ValueError: for a single response, which has no baseline.
    """
    if not rewards:
        return np.zeros(0)
    if len(rewards) < 2:
        raise ValueError(f"a group baseline needs at least 2 responses per prompt, got {len(rewards)}")
    centred = np.asarray(rewards, dtype=np.float64) - np.mean(rewards)
    std = unbiased_std(centred)
    if std < 1e-8:
        return np.zeros_like(centred)
    return centred / (std + 1e-6) if normalise else centred


def leave_one_out(rewards: Sequence[float]) -> np.ndarray:
    """A[K] = r_i - mean of the others = K / (K - 1) (r_i - mean of all): "Buy 4 REINFORCE Samples, Get a Baseline for Free!"."""
    return len(rewards) / max(len(rewards) - 1, 1) * group_advantages(rewards)


def unbiased_std(values: np.ndarray) -> float:
    """Standard deviation with K - 1 in the denominator; 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
