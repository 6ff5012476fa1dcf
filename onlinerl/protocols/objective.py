"""The role of objectives: what a reward or preference model is trained for.

To a learner an objective is what an algorithm is: what it needs, and a pure loss over a micro-batch. Around them nothing is the same: there
are no rollouts, no oracle and no reference, so an objective makes its items of stored comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types.preferences import Comparison
from onlinerl.types.prompts import RawPrompt
from onlinerl.types.training import TrainItem, TrainSequence


class Objective(Algorithm):
    """What a reward or preference model is trained for. An item is a comparison: two sequences of tokens, which the model reads whole."""

    chosen_by: ClassVar[str] = "objective"

    unit = "pair"
    reference = "none"
    oracle: ClassVar[str | None] = None
    """The oracle that asks such a model, by its name."""
    compares: ClassVar[bool] = False
    """Whether a sequence holds both responses; else one."""

    def encode(self, tokenizer: Any, prompt: RawPrompt, first: str, second: str, model: str) -> tuple[list[int], list[int]]:
        """Tokens of the two sequences in which a model reads that `first` is to be compared with `second`.

        Raises:
            Unreadable: see `preference_models`.
        """
        raise NotImplementedError

    def item(self, comparison: Comparison, tokens: Sequence[Sequence[int]]) -> TrainItem:
        """What is trained of a comparison whose two sequences are these tokens."""
        raise NotImplementedError

    def objections(self, comparisons: Sequence[Comparison]) -> str | None:
        """What makes it pointless to train on these; None if nothing does."""
        return None

    def log_odds(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """f64[N]: log-odds that the first response beats the second, from the model's outputs [N, D] for the two sequences of each pair."""
        raise NotImplementedError


class RewardLearner(Protocol):
    """What else is asked of a learner that trains such a model."""

    def rewards(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """f32[D] of each sequence: the outputs of the head at its last token."""
        ...
