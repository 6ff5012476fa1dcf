"""What the tables of a run hold beside groups of responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onlinerl.types.labels import Cost, Failure, Pair, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What an oracle said about the group of one prompt."""

    prompt_id: str
    result: Verdict | Failure
    """Its cost is what was paid for this label, nothing where it was known."""
    key: str = ""
    """By which the same question to the same oracle is recognised (`label_key`); empty in runs of older versions."""
    reused_from: str | None = None
    """The table that it was taken from, RUN/iterations/0001/verdicts; None if it was asked for."""
    saved: Cost = field(default_factory=Cost)
    """What it had cost there."""


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
