"""Scales that follow from all iterations so far. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
