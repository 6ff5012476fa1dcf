"""Which items an optimizer step trains on. No torch, so that the controller can ask."""

from __future__ import annotations

import random
from collections.abc import Sequence

from onlinerl.types import derive_seed


def schedule(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices into `count` items, one list per optimizer step, reshuffled in every epoch.

    The same arguments give the same lists. The last step of an epoch may be short; no step spans two epochs.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    steps = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(derive_seed("schedule", seed, epoch)).shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, count, batch_size)]
    return steps


def staged(stages: Sequence[Sequence[int]], batch_size: int, epochs: int, seed: int) -> list[list[list[int]]]:
    """The same, by stage, for items that are trained in stages, given by their indices. A single stage is `schedule`.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    steps = []
    for number, stage in enumerate(stages):
        own = schedule(len(stage), batch_size, epochs, derive_seed("stage", seed, number) if number else seed)
        steps.append([[stage[place] for place in step] for step in own])
    return steps
