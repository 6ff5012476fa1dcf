"""What the loop works with. `app` fills it in; the loop knows none of the concrete classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from onlinerl.config import RunConfig, TrainingConfig
from onlinerl.controller.asking import Asker
from onlinerl.graph import Phase
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.engine import RolloutEngine
from onlinerl.protocols.learner import Learner
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.protocols.prompts import PromptSource
from onlinerl.protocols.refreshing import RewardTrainer
from onlinerl.protocols.store import Store
from onlinerl.protocols.sync import WeightSync
from onlinerl.protocols.tracker import Tracker
from onlinerl.types import Group, Prompt, TrainItem


@dataclass(kw_only=True)
class Parts:
    """Everything one run needs, wired."""

    config: RunConfig
    algorithm: Algorithm
    asker: Asker
    """The oracle."""
    label_asker: Asker | None = None
    """The oracle that the reward model of the run learns from; None where it stays as it is."""
    reward_trainer: RewardTrainer | None = None
    """Who trains that further."""
    pairing: PairBuilder
    train_prompts: PromptSource
    heldout: Sequence[Prompt]
    anchors: Sequence[Group] = ()
    """Pairs whose better response is known, to examine the oracle by."""
    engine: RolloutEngine
    learner: Learner
    sync: WeightSync
    store: Store
    tracker: Tracker
    phases: tuple[Phase, ...]
    """What the loop does."""
    shared_hardware: bool = False
    """Whether engine and learner compute on the same GPUs or cores: then only one of them works at a time."""
    base_model: str
    """Directory or id of the initial policy: iteration 0 and the anchor of `kl_ref`."""
    tokenizer: Any = None
    """Of the policy, where the learner samples."""
    oracle_scores: bool = True
    """Whether the oracle scores single responses; one that only compares is never asked about a single one."""
    state_bytes: int = 0
    """Size of one checkpoint plus export, for the free-space check."""

    @cached_property
    def prompts_by_id(self) -> dict[str, Prompt]:
        """The training prompts."""
        return {prompt.id: prompt for prompt in self.train_prompts}


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the judged groups of an iteration gave to train on."""

    items: Sequence[TrainItem]
    """In the order of the prompts."""
    spreads: Sequence[float]
    """Of every judged group, in the same order (see `health.spread`)."""
    earned: Sequence[float]
    """What each sampled response of the items earns."""
    sampled_by: Mapping[int, int]
    """How many sequences of the items each version of the policy sampled."""
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
    replayed: Mapping[int, int] = field(default_factory=dict)
    """How many items are of earlier iterations, by how many iterations old they are."""


def samples_dynamically(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether prompts whose responses are judged all alike are replaced by others."""
    chosen = config.sampling.dynamic
    return algorithm.needs.dynamic_sampling if chosen is None else chosen


def reference_iteration(schedule: str, every: int, iteration: int) -> int | None:
    """Which iterate the reference of `iteration` is, or the newest in it if it is an average: 0 for the base model, None for no reference.

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


def learning_rates(training: TrainingConfig, iteration: int, steps: int) -> list[float]:
    """One learning rate per optimizer step of this iteration."""
    peak = training.learning_rate * training.iteration_decay ** (iteration - 1)
    warmup = round(training.warmup_ratio * steps)
    rates = []
    for step in range(steps):
        if step < warmup:
            rates.append(peak * (step + 1) / (warmup + 1))
            continue
        progress = (step - warmup) / max(1, steps - warmup)
        shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        rates.append(peak * shape[training.lr_scheduler_type])
    return rates


def batched(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
