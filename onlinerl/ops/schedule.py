"""Which items an optimizer step trains on. No torch, so that the controller can ask."""

from __future__ import annotations

import random

from onlinerl.types import derive_seed


def schedule(count: int, items_per_step: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices into `count` items, one list per optimizer step, reshuffled in every epoch.

    The same arguments give the same lists. The last step of an epoch may be short; no step spans two epochs.

    Raises:
        ValueError: if `items_per_step` is below 1.
    """
    if items_per_step < 1:
        raise ValueError(f"items_per_step must be at least 1, got {items_per_step}")
    steps = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(derive_seed("schedule", seed, epoch)).shuffle(order)
        steps += [order[start : start + items_per_step] for start in range(0, count, items_per_step)]
    return steps
