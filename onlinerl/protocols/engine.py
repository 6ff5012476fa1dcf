"""The role of rollout engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from onlinerl.types import Group, Request, Sampling


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Groups in the order in which they finish."""
        ...

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Teacher-forced log-probs of (prompt, response) tokens under the engine's weights: f32[T] each."""
        ...
