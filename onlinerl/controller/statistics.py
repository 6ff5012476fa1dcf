"""Error bars. The unit of independence is the prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

_DRAWN_NUMBERS = 1 << 20
"""Of a resample, in memory at once."""
Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts with its 95 % interval."""

    value: float
    low: float
    high: float
    se: float
    n: int


def bootstrap(values: Sequence[float], *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of one value per prompt; percentile bootstrap over prompts. Non-finite values are left out."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if array.size == 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, se=math.nan, n=0)
    means = np.concatenate([array[chosen].mean(axis=1) for chosen in _drawn(array.size, draws, seed)])
    low, high = np.percentile(means, [2.5, 97.5])
    se = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return Estimate(value=float(array.mean()), low=float(low), high=float(high), se=se, n=int(array.size))


def _drawn(size: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples of `size` things, i64[some, size], `draws` in all: the same whatever part of them is drawn at once."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_NUMBERS // size)
    for start in range(0, draws, at_once):
        yield rng.integers(0, size, size=(min(at_once, draws - start), size))


def wilson(wins: Sequence[float]) -> Estimate:
    """Mean of one result in [0, 1] per prompt (1 win, 0.5 tie, 0 loss) with the Wilson interval.

    Conservative for ties: their variance is at most that of a coin with the same mean. To decide by, see `decisive`.
    """
    n = len(wins)
    if n == 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, se=math.nan, n=0)
    p = float(np.mean(wins))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # The bounds contain p by construction; at p = 0 and 1 only up to rounding.
    return Estimate(
        value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)), se=math.sqrt(p * (1 - p) / n), n=n
    )


FEWEST = 30
"""Results of which a bootstrap says anything: all of a few may be equal by chance."""


def decisive(results: Sequence[float]) -> Estimate:
    """Mean of one result in [0, 1] each (1/2 for a tie), with the interval to decide by: Wilson's, or where there are ties that of a bootstrap.

    Wilson's interval takes a tie for half a coin flip, and is about 40 % too wide where half of the results are ties.
    """
    tied = any(0.0 < each < 1.0 for each in results)
    return bootstrap(results) if tied and len(results) >= FEWEST else wilson(results)


def ratio(totals: Sequence[float], counts: Sequence[int], *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Sum of `totals` over sum of `counts` (one pair per prompt, e.g. nats and tokens), bootstrap over prompts; n is the count.

    The standard error is that of the bootstrap.
    """
    top, bottom = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if not bottom.sum():
        return Estimate(value=math.nan, low=math.nan, high=math.nan, se=math.nan, n=0)
    sums = [(top[chosen].sum(axis=1), bottom[chosen].sum(axis=1)) for chosen in _drawn(top.size, draws, seed)]
    above, below = (np.concatenate(parts) for parts in zip(*sums, strict=True))
    ratios = above[below > 0] / below[below > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    value = float(top.sum() / bottom.sum())
    return Estimate(value=value, low=float(low), high=float(high), se=float(ratios.std()), n=int(bottom.sum()))


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(policy || other) in nats per sequence, two estimators of the same quantity."""

    k1: Estimate
    k3: Estimate
    clamped: int
    """Tokens whose log-ratio was outside [-20, 20]."""
    tokens: int

    @property
    def clamped_share(self) -> float:
        """Share of the tokens that were clamped."""
        return self.clamped / max(1, self.tokens)

    @property
    def estimator(self) -> Literal["k1", "k3"]:
        """Which of the two is the headline: k3, unless more than 0.1 % of the tokens are clamped or it is the noisier one.

        Near the other model k3 has far less noise; far from it, tokens that are rare under the policy can make it the noisier one.
        """
        return "k1" if self.clamped_share > 1e-3 or self.k3.se > self.k1.se else "k3"

    @property
    def headline(self) -> Estimate:
        """The estimate to quote; always say `estimator` with it."""
        return self.k1 if self.estimator == "k1" else self.k3

    @property
    def conflict(self) -> bool:
        """True if the two differ by more than three standard errors of k1: a wrong sampler, wrong weights, or too few samples."""
        return abs(self.k1.value - self.k3.value) > 3 * self.k1.se


def divergence(policy: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Divergence:
    """KL of samples y ~ policy from log-probs f32[T] under both models, both from the learner's scorer.

    k1 = sum_t d_t, k3 = sum_t (exp(-d_t) - 1 + d_t), d_t = log policy - log other.
    """
    k1, k3, clamped, tokens = [], [], 0, 0
    for p, q in zip(policy, other, strict=True):
        d = np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)
        clamped += int((np.abs(d) > 20).sum())
        tokens += d.size
        d = np.clip(d, -20, 20)
        k1.append(float(d.sum()))
        k3.append(float(np.maximum(np.expm1(-d) + d, 0.0).sum()))  # expm1 and the bound: no rounding below 0
    return Divergence(k1=bootstrap(k1), k3=bootstrap(k3), clamped=clamped, tokens=tokens)
