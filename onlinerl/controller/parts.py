"""What the loop works with. `app` fills it in; the loop knows none of the concrete classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onlinerl.config import RunConfig
from onlinerl.protocols import Algorithm, Learner, Oracle, PairBuilder, PromptSource, RolloutEngine, Store, Tracker, WeightSync
from onlinerl.types import Judged, Prompt, SelfTest, TrainItem


class ArtefactStore(Store, Protocol):
    """A store that also keeps checkpoints and exports."""

    def staged(self, kind: Any, iteration: int) -> AbstractContextManager[Path]:
        """A directory that becomes the artefact when the block ends."""
        ...

    def require_files(self, path: Path, written: Mapping[str, int]) -> None:
        """Refuse a staged artefact that lacks anything of what was written to it."""
        ...

    def require(self, kind: Any, iteration: int) -> Path:
        """A complete artefact, every byte of it verified."""
        ...

    def retain(self, kind: Any, keep: set[int]) -> None:
        """Remove all others."""
        ...

    def require_free(self, bytes_needed: int, min_free_bytes: int) -> None:
        """Refuse before writing."""
        ...


class SelfTestingLearner(Learner, Protocol):
    """A learner that can test itself before the first step."""

    def self_test(self, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        """Compare what the items carry with what the policy says, and the policy with the base model on disk."""
        ...


@dataclass(kw_only=True)
class Parts:
    """Everything one run needs, wired."""

    config: RunConfig
    algorithm: Algorithm
    oracle: Oracle
    pairing: PairBuilder
    train_prompts: PromptSource
    heldout: Sequence[Prompt]
    engine: RolloutEngine
    learner: SelfTestingLearner
    sync: WeightSync
    store: ArtefactStore
    tracker: Tracker
    base_model: str
    """Directory or id of the initial policy: iteration 0 and the anchor of `kl_ref`."""
    oracle_scores: bool = True
    """Whether the oracle scores single responses; one that only compares is never asked about a single one."""
    state_bytes: int = 0
    """Size of one checkpoint plus export, for the free-space check."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the judged groups of an iteration gave to train on."""

    items: Sequence[TrainItem]
    """In the order of the prompts."""
    judged: Sequence[Judged]
    dropped: Mapping[str, int]
    """What was left out, by reason: groups (`few_samples`, `not_judged`), candidate pairs (the pair builder's reasons), items
    (`truncated`)."""
    contradicted: int
    """Pairs whose winner lost the direct comparison with its own loser; they are trained all the same."""
    truncated: int
    """Items with a response that hit max_new_tokens, kept or dropped."""
    useful: int
    """Groups that gave at least one item."""
    groups: int
    """Groups that were sampled."""


def reference_iteration(schedule: str, every: int, iteration: int) -> int | None:
    """Which iterate the reference of `iteration` is: 0 for the base model, None for no reference.

    >>> [reference_iteration("every_n", 2, t) for t in (1, 2, 3, 4, 5)]
    [0, 0, 2, 2, 4]
    """
    if schedule == "none":
        return None
    if schedule == "fixed":
        return 0
    if schedule == "previous":
        return iteration - 1
    return (iteration - 1) // every * every


def learning_rates(config: RunConfig, iteration: int, steps: int) -> list[float]:
    """One learning rate per optimizer step of this iteration."""
    training = config.training
    peak = training.learning_rate * training.iteration_decay ** (iteration - 1)
    warmup = round(training.warmup * steps)
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append(peak * (step + 1) / (warmup + 1))
            continue
        progress = (step - warmup) / max(1, steps - warmup)
        shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        rates.append(peak * shape[training.schedule])
    return rates


def batched(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
