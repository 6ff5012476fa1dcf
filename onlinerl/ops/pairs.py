"""Judged groups and their pairs -> what is trained. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onlinerl.ops.items import train_sequences
from onlinerl.types.training import TrainItem

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Pair


def pair_items(judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
    """One item of two sequences per pair, chosen first, and how many were left out: `unjudged`, and `identical` ones, whose margin is always 0."""
    sequences = train_sequences(judged, {index for pair in pairs for index in (pair.chosen, pair.rejected)})
    items: list[TrainItem] = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        chosen, rejected = sequences.get(pair.chosen), sequences.get(pair.rejected)
        if pair.steps is not None:
            from onlinerl.ops.steps import step_sequence  # few pairs are of steps

            chosen, rejected = (step_sequence(judged, step) for step in pair.steps)
        if chosen is None or rejected is None:
            dropped["unjudged"] += 1
        elif chosen.response_ids == rejected.response_ids:
            dropped["identical"] += 1
        else:
            items.append(TrainItem(prompt_id=judged.group.prompt.id, sequences=(chosen, rejected), prob=pair.prob))
    return items, dropped
