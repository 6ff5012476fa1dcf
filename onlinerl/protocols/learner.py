"""The role of learners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from onlinerl.types import SelfTest, TrainItem, TrainSequence, UpdateReport


@runtime_checkable
class Learner(Protocol):
    """Holds the policy and its optimizer."""

    def score(self, sequences: Sequence[TrainSequence], *, model: str, temperature: float) -> list[np.ndarray]:
        """Log-probs f32[T] of each response under `model`: "policy", or the path of a saved model."""
        ...

    def values(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """Critic values f32[T] of each response."""
        ...

    def update(self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float]) -> Iterator[UpdateReport]:
        """Take one optimizer step per element of `steps`, yielding a report after each."""
        ...

    def self_test(self, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        """Before the first step: compare what the items carry with what the policy says, and the policy with the base model on disk."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments."""
        ...

    def save(self, path: Path) -> Mapping[str, int]:
        """Weights, optimizer and RNG states of all ranks, for exact continuation. Returns what was written: bytes by relative path."""
        ...

    def load(self, path: Path) -> None:
        """The reverse of `save`."""
        ...

    def export(self, path: Path) -> None:
        """The policy in Hugging Face format."""
        ...
