"""Judged groups -> what is trained. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onlinerl.types import Judged, Pair, TrainItem, TrainSequence


def train_sequences(judged: Judged) -> list[TrainSequence]:
    """All K responses of a group, with score, win rate and the log-probs that the engine reported.

    The score is the oracle's own; an oracle that only compares gives none, and then the win rate stands in for it.
    """
    win_rates = judged.verdict.win_rates()
    scores = win_rates if judged.verdict.scores is None else judged.verdict.scores
    return [
        TrainSequence(
            prompt_ids=judged.group.prompt.token_ids,
            response_ids=rollout.token_ids,
            score=float(score),
            win_rate=float(win_rate),
            finish_reason=rollout.finish_reason,
            policy_version=rollout.policy_version,
            behaviour=np.asarray(rollout.logprobs, dtype=np.float32),
        )
        for rollout, score, win_rate in zip(judged.group.rollouts, scores, win_rates, strict=True)
    ]


def sample_item(judged: Judged, sequence: TrainSequence) -> TrainItem:
    """One response, trained by itself."""
    return TrainItem(prompt_id=judged.group.prompt.id, sequences=(sequence,))


def pair_items(judged: Judged, pairs: Sequence[Pair]) -> list[TrainItem]:
    """One item of two sequences per pair, chosen first. Pairs of identical token sequences are left out: their margin is always 0."""
    sequences = train_sequences(judged)
    return [
        TrainItem(
            prompt_id=judged.group.prompt.id,
            sequences=(sequences[pair.chosen], sequences[pair.rejected]),
            prob=pair.prob,
        )
        for pair in pairs
        if sequences[pair.chosen].response_ids != sequences[pair.rejected].response_ids
    ]


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
