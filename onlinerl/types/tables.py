"""What the tables of a run hold beside groups of responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onlinerl.types.labels import Failure, Pair, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What an oracle said about the group of one prompt."""

    prompt_id: str
    result: Verdict | Failure


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProbs:
    """What a learner said about the training sequences of one prompt."""

    prompt_id: str
    arrays: Mapping[str, tuple[np.ndarray, ...]]
    """By name (old_logprobs, reference_logprobs, anchor_logprobs, values; logprobs of answers to held-out prompts): f32[T] of each sequence, in the order
    of the prompt's items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedPair:
    """A pair that was trained on, with its texts, for people."""

    prompt_id: str
    pair: Pair
    chosen_text: str
    rejected_text: str
    policy_version: int
