"""Judged groups -> what is trained. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged
    from onlinerl.types.training import TrainItem, TrainSequence


def train_sequences(judged: Judged, only: Collection[int] | None = None) -> dict[int, TrainSequence]:
    """The judged responses of a group, or `only` these, by their index in it, with score, win rate and the engine's log-probs. The score is
    the oracle's own; an oracle that only compares gives none, and then the win rate stands in for it. A response that nobody judged has
    neither, and is left out."""
    from onlinerl.types.training import TrainSequence  # not with the module: a loss makes none

    win_rates = judged.verdict.win_rates()
    scores = win_rates if judged.verdict.scores is None else judged.verdict.scores
    components = judged.verdict.components or {}
    return {
        index: TrainSequence(
            # What a response was made to begin with is context like the prompt: it has no part in ratios, lengths and advantages.
            prompt_ids=(*judged.group.prompt.token_ids, *map(int, rollout.prefix_ids)),
            prefix=len(rollout.prefix_ids),
            response_ids=rollout.token_ids,
            score=float(score),
            components={name: float(values[index]) for name, values in components.items()},
            win_rate=float(win_rate),
            finish_reason=rollout.finish_reason,
            policy_version=None if rollout.source == "teacher" else rollout.policy_version,
            behavior_logprobs=None if rollout.source == "teacher" else np.asarray(rollout.logprobs, dtype=np.float32),
            source=rollout.source,
        )
        for index, (rollout, score, win_rate, said) in enumerate(
            zip(judged.group.rollouts, scores, win_rates, judged.verdict.judged(), strict=True)
        )
        if said and (only is None or index in only)
    }


def judged_sequences(judged: Judged, at_least: int = 1) -> tuple[list[TrainSequence], Counter[str]]:
    """The judged responses of a group in their order, and how many were left out for which reason: `unjudged`, and `single` for those
    that are too few to be compared (fewer than `at_least`)."""
    sequences = list(train_sequences(judged).values())
    dropped = Counter(unjudged=len(judged.group.rollouts) - len(sequences))
    if len(sequences) < at_least:
        dropped["single"] = len(sequences)
        sequences = []
    return sequences, +dropped


def sample_items(judged: Judged, sequences: Iterable[TrainSequence]) -> list[TrainItem]:
    """Each response by itself."""
    from onlinerl.types.training import TrainItem

    return [TrainItem(prompt_id=judged.group.prompt.id, sequences=(sequence,)) for sequence in sequences]


def with_advantages(sequences: Sequence[TrainSequence], advantages: Iterable[float]) -> list[TrainSequence]:
    """Each response with its one advantage on every token, f32[T]."""
    return [s.with_(advantages=np.full(len(s.response_ids), a, np.float32)) for s, a in zip(sequences, advantages, strict=True)]


def need(sequence: TrainSequence, name: str) -> np.ndarray:
    """A per-token field, f64[T], that an algorithm's `prepare` cannot do without.

    Raises:
        ValueError: if it was not filled in.
    """
    value = getattr(sequence, name)
    if value is None:
        raise ValueError(f"`prepare` reads sequence.{name}, which was not filled in; declare it in the algorithm's `needs`")
    return np.asarray(value, dtype=np.float64)


def with_sequence(item: TrainItem, sequence: TrainSequence) -> TrainItem:
    """The same single-response item with another version of its sequence."""
    return replace(item, sequences=(sequence,))
