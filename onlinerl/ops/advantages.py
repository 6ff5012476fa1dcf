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


def whiten(parts: Sequence[np.ndarray], *, keep_mean: bool = False) -> list[np.ndarray]:
    """Scale all tokens of all parts together to variance 1, and shift them to mean 0 unless `keep_mean`.

    The variance is the unbiased one plus 1e-8, so that numerical dust around equal advantages is not blown up to unit variance.
    """
    if not parts:
        return []
    tokens = np.concatenate(parts)
    if tokens.size == 0:
        return list(parts)
    mean, std = tokens.mean(), np.sqrt(unbiased_std(tokens) ** 2 + 1e-8)
    return [(part - mean) / std + (mean if keep_mean else 0.0) for part in parts]


def normalized(values: np.ndarray, earlier: Sequence[tuple[float, float, float]] = ()) -> np.ndarray:
    """`values` minus the mean, divided by the standard deviation, of themselves and all earlier ones together.

    Args:
        values: f64[N].
        earlier: (count, mean, standard deviation with N in the denominator) of each earlier set.
    """
    if not values.size:
        return values
    sets = [*earlier, (float(values.size), float(values.mean()), float(values.std()))]
    total = sum(count for count, _, _ in sets)
    mean = sum(count * m for count, m, _ in sets) / total
    variance = sum(count * (std**2 + (m - mean) ** 2) for count, m, std in sets) / total
    centred = values - mean
    return centred if variance < 1e-16 else centred / np.sqrt(variance)


def adapted_kl(kl: float, measured: Sequence[tuple[float, float]], *, target: float, horizon: float) -> float:
    """The price of the KL after each (KL, number of responses) measured with it: up where the KL is above `target`, down where below.

    kl *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon: "Fine-Tuning Language Models from Human Preferences", section 2.2. No
    update takes more than a fifth, so that few large ones are as bounded as many small ones, and the price stays within 1e-4 and 1 (or
    where it started, if that is outside).
    """
    lowest, highest = min(kl, 1e-4), max(kl, 1.0)
    for value, count in measured:
        error = min(max(value / target - 1.0, -0.2), 0.2)
        kl = min(max(kl * (1.0 + error * min(count / horizon, 1.0)), lowest), highest)
    return kl


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
