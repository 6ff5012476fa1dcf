"""Scales that follow from all responses of an iteration. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

Parts = Callable[[], Iterable[np.ndarray]]
"""Gives the same numbers, f64[T] at a time, as often as it is called: nobody need have all of them in memory."""
_BLOCK = 1 << 16
"""Numbers that are summed at once."""


def whitening(parts: Parts, *, keep_mean: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """What scales all tokens of all parts together to variance 1, and shifts them to mean 0 unless `keep_mean`.

    The variance is the unbiased one plus 1e-8, so that numerical dust around equal advantages is not blown up to unit variance.
    """
    mean, variance = moments(parts, ddof=1)
    std = np.sqrt(np.sqrt(variance) ** 2 + 1e-8)
    return lambda part: (part - mean) / std + (mean if keep_mean else 0.0)


def moments(parts: Parts, *, ddof: int = 0) -> tuple[float, float]:
    """Mean and variance (N - `ddof`) of all numbers: to the last bit what numpy says of one array of them. 0 where it says nothing."""
    count = sum(part.size for part in parts())
    mean = _sum(parts(), count) / max(count, 1)
    return mean, _sum(((part - mean) ** 2 for part in parts()), count) / max(count - ddof, 1)


def _sum(parts: Iterable[np.ndarray], count: int) -> float:
    """Added up in numpy's order, by halves ("The Accuracy of Floating Point Summation": pairwise), with little of it in memory."""
    stream, rest = iter(parts), np.empty(0)

    def added(size: int) -> float:
        nonlocal rest
        if size > _BLOCK:
            first = size // 2 - size // 2 % 8  # where numpy divides it
            return added(first) + added(size - first)
        taken, there = [rest], rest.size
        while there < size:
            taken.append(next(stream))
            there += taken[-1].size
        whole = np.concatenate(taken)
        rest = whole[size:]
        return float(np.add.reduce(whole[:size]))

    return added(count)
