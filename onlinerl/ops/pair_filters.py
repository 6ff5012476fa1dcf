"""Which pairs a loss leaves out, and the samples of the policy that may go with those that stay. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onlinerl.ops.items import need, train_sequences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onlinerl.types.labels import Judged
    from onlinerl.types.training import TrainItem, TrainSequence


def by_scores(items: Sequence[TrainItem], margin: float | None, floor: float | None) -> tuple[list[TrainItem], Counter[str]]:
    """Pairs whose scores differ by `margin` at least, and whose chosen response has `floor` at least; how many others there are by reason,
    `gap` before `floor`."""
    kept: list[TrainItem] = []
    dropped: Counter[str] = Counter()
    for item in items:
        winner, loser = item.sequences[:2]
        if margin is not None and winner.score - loser.score < margin:
            dropped["gap"] += 1
        elif floor is not None and winner.score < floor:
            dropped["floor"] += 1
        else:
            kept.append(item)
    return kept, dropped


def by_learner(
    items: Sequence[TrainItem],
    places: Sequence[int],
    max_reference_margin: float | None,
    ches_share: float,
    *,
    normalized: bool,
) -> tuple[Sequence[int], Mapping[str, int]]:
    """Those of `places` whose pairs pass by what the learner says of them, and how many do not by reason.

    Args:
        items: of the iteration.
        places: of those that are meant.
        max_reference_margin: by how many nats the reference may rank a pair wrong; None lets all pass.
        ches_share: share of the others, those with the highest CHES, that are left out too.
        normalized: whether that is of means over a response, else of sums.

    Raises:
        ValueError: if a pair lacks what it is judged by.
    """
    kept, dropped = places, dict[str, int]()
    if max_reference_margin is not None:
        kept = [place for place in places if not _wrong_by(items[place]) > max_reference_margin]
        dropped["reference_margin"] = len(places) - len(kept)
    left_out = int(ches_share * len(kept))
    if left_out:
        scores = np.array([need(items[place].sequences[0], "ches")[int(normalized)] for place in kept])
        highest = set(np.argsort(-scores, kind="stable")[:left_out].tolist())
        kept, dropped["ches"] = [place for n, place in enumerate(kept) if n not in highest], left_out
    return kept, dropped


def _wrong_by(item: TrainItem) -> float:
    """Log-prob of the rejected response minus that of the chosen one under the reference, in nats."""
    chosen, rejected = (need(s, "reference_logprobs").sum() for s in item.sequences[:2])
    return float(rejected - chosen)


def with_samples(items: Sequence[TrainItem], judged: Judged, count: int) -> list[TrainItem]:
    """Pairs of one group with places of its first `count` judged samples of the policy, which come last among the sequences where they have
    other tokens than the pair."""
    samples = [s for s in train_sequences(judged).values() if s.source == "policy"][:count] if items else []
    return [_with(item, samples) for item in items]


def _with(item: TrainItem, samples: Sequence[TrainSequence]) -> TrainItem:
    sequences = list(item.sequences)
    places = []
    for sample in samples:
        place = next((place for place, s in enumerate(sequences) if _alike(s, sample)), len(sequences))
        if place == len(sequences):
            sequences.append(sample)
        places.append(place)
    return replace(item, sequences=tuple(sequences), online=tuple(places))


def _alike(one: TrainSequence, other: TrainSequence) -> bool:
    """Whether their tokens are the same, those of the prompt too."""
    return one.prompt_ids == other.prompt_ids and tuple(one.response_ids) == tuple(other.response_ids)
