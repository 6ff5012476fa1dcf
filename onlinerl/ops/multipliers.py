"""Lagrange multipliers of constraints on mean scores, as they follow from the means of all iterations so far. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Form = Literal["bounded", "equality", "linear", "cost"]
LARGEST = 20.0
"""Of |log lambda| in the cost form: exp() of more says nothing that a smaller number does not."""


def weight(form: Form, u: float) -> float:
    """What the advantage of a constrained score is multiplied by: sigmoid(u), tanh(u), u, or exp(u).

    "Confronting Reward Model Overoptimization with Constrained RLHF", section 5 (bounded; tanh for equality), and "Safe RLHF: Safe
    Reinforcement Learning from Human Feedback", section 3.3 (cost).
    """
    if form == "bounded":
        return 1.0 / (1.0 + math.exp(-u)) if u > -700 else 0.0
    if form == "equality":
        return math.tanh(u)
    return u if form == "linear" else math.exp(min(max(u, -LARGEST), LARGEST))


def slope(form: Form, u: float, gap: float) -> float:
    """The derivative by u of weight(u) * gap, gap = mean score - threshold; what the minimised loss of a multiplier is."""
    w = weight(form, u)
    factor = {"bounded": w * (1.0 - w), "equality": 1.0 - w * w, "linear": 1.0, "cost": -w}[form]
    return factor * gap


def after(
    form: Form,
    thresholds: Mapping[str, float],
    means: Sequence[Mapping[str, float]],
    *,
    u0: Mapping[str, float],
    rate: float,
    momentum: float = 0.0,
    max_grad_norm: float = math.inf,
    window: int = 1,
) -> dict[str, float]:
    """u of each constraint after one step of SGD for each iteration.

    u falls while a mean is above its threshold and rises below it; in the cost form log lambda += rate * lambda * (mean cost - limit),
    the other way round.

    Args:
        form: of the weights.
        thresholds: by the name of the score.
        means: of each iteration that had something to learn, the mean of each score, by its name, oldest first.
        u0: where each of them begins.
        rate, momentum: as of torch.optim.SGD.
        max_grad_norm: longest gradient of all multipliers together.
        window: so many iterations are averaged, the latest among them.
    """
    u = {name: u0[name] for name in thresholds}
    velocity = dict.fromkeys(thresholds, 0.0)
    for number in range(len(means)):
        recent = means[max(0, number + 1 - window) : number + 1]
        gaps = {name: math.fsum(m[name] for m in recent) / len(recent) - limit for name, limit in thresholds.items()}
        gradient = {name: slope(form, u[name], gaps[name]) for name in thresholds}
        norm = math.hypot(*gradient.values())
        scale = max_grad_norm / norm if norm > max_grad_norm else 1.0
        for name in thresholds:
            velocity[name] = momentum * velocity[name] + scale * gradient[name]
            moved = u[name] - rate * velocity[name]
            u[name] = min(max(moved, -LARGEST), LARGEST) if form == "cost" else moved
    return u
