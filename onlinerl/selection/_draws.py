"""Chance that depends on a seed and on what is drawn, and on nothing else: a prompt more moves none of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping

from onlinerl.types import derive_seed


def uniform(*seed: object) -> float:
    """Within (0, 1)."""
    return (derive_seed(*seed) + 0.5) / 2**31


def drawn(weights: Mapping[str, float], most: int, *seed: object) -> list[tuple[str, float]]:
    """At most so many keys without replacement, each draw in proportion to the weights of what is left, with the probability of each draw.

    Each key waits for a time that is exponential with its weight as the rate, and the first ones are taken: "Weighted random sampling with a
    reservoir" (Efraimidis and Spirakis, 2006), whose keys u^(1/w) are in the same order. A weight of 0 is never drawn.
    """
    waits = {key: -math.log(uniform(*seed, key)) / weight for key, weight in weights.items() if weight > 0}
    order = sorted(waits, key=lambda key: (waits[key], key))
    left = math.fsum(weights[key] for key in order[most:])
    found: list[tuple[str, float]] = []
    for key in reversed(order[:most]):  # summed from the end, so that the last probability is exact
        left += weights[key]
        found.append((key, weights[key] / left))
    return found[::-1]
