"""Fitting probabilities to outcomes, and how far probabilities are from frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEPS, LARGEST = 100, 1e3
DRAWS = 200
"""Of the labels, for the noise floor."""
BINS, PER_BIN = 15, 100
"""Most bins, and predictions that each should have."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """P = sigmoid(slope * log-odds + intercept)."""

    slope: float
    intercept: float = 0.0


def fit(log_odds: np.ndarray, outcomes: np.ndarray, *, intercept: bool) -> Fit:
    """The fit of least negative log-likelihood (Platt's with an intercept, temperature 1 / slope without), by Newton's method.

    Args:
        log_odds: f64[n], finite.
        outcomes: f64[n], how probable each was to come true, mostly 0 or 1.
        intercept: whether there is one.

    Returns:
        The fit; a slope of at most 1,000, where the data do not bound it.
    """
    columns = [log_odds, np.ones_like(log_odds)] if intercept else [log_odds]
    x, weights = np.stack(columns, axis=1), np.zeros(len(columns))
    loss = _loss(x @ weights, outcomes)
    for _ in range(STEPS):
        p = _sigmoid(x @ weights)
        slope = x.T @ (p - outcomes)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(len(weights))
        step, scale = np.linalg.solve(curvature, slope), 1.0
        while (after := _loss(x @ (weights - scale * step), outcomes)) > loss and scale > 1e-6:
            scale /= 2
        weights = np.clip(weights - scale * step, -LARGEST, LARGEST)
        if loss - after < 1e-12 * max(1.0, loss):
            break
        loss = after
    return Fit(slope=float(weights[0]), intercept=float(weights[1]) if intercept else 0.0)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """ECE: sum over bins of n_b / n |accuracy - confidence|, in bins of equal mass.

    Args:
        confidence: f64[n], how probable the predicted winner was to win, from 1/2 on.
        right: f64[n], 1 where it did, 1/2 where none was predicted, or how probable that is in truth.

    Source: "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3, with bins of equal mass.
    """
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins(len(confidence)))
    return float(sum(abs(right[part].sum() - confidence[part].sum()) for part in parts) / max(1, len(confidence)))


def bins(count: int) -> int:
    """How many bins so many predictions are put in."""
    return max(1, min(BINS, count // PER_BIN))


def noise_floor(confidence: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Mean and 95th percentile of the ECE of so many predictions that are right as often as they say: only a larger one says something."""
    draw = np.random.default_rng(seed)
    found = [
        calibration_error(confidence, (draw.random(len(confidence)) < confidence).astype(np.float64)) for _ in range(DRAWS)
    ]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def predictions(probs: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence in the winner that is predicted, and whether it wins (1/2 where none is), f64[n] each.

    Args:
        probs: f64[n], how probable the first was to win.
        outcomes: f64[n], how probable it was in truth, mostly 0 or 1.
    """
    right = np.where(probs > 0.5, outcomes, np.where(probs < 0.5, 1 - outcomes, 0.5))
    return np.maximum(probs, 1 - probs), right


def logit(probs: np.ndarray) -> np.ndarray:
    """Of probabilities, which are held within 1e-6 of 0 and 1."""
    p = np.clip(probs, 1e-6, 1 - 1e-6)
    odds: np.ndarray = np.log(p / (1 - p))
    return odds


def _sigmoid(z: np.ndarray) -> np.ndarray:
    p: np.ndarray = 1 / (1 + np.exp(-np.clip(z, -700, 700)))
    return p


def _loss(z: np.ndarray, outcomes: np.ndarray) -> float:
    """Negative log-likelihood in nats, summed."""
    total = float(np.sum(np.logaddexp(0.0, -z) * outcomes + np.logaddexp(0.0, z) * (1 - outcomes)))
    return total if math.isfinite(total) else math.inf
