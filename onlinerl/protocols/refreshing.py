"""What refreshing a reward model inside a run takes: an oracle that can take on other weights, another one that gives the labels, and who trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Group, Interval, Verdict

Mode = Literal["continue", "retrain"]


class Reloads(Protocol):
    """An oracle with weights that can be replaced."""

    @property
    def version(self) -> str:
        """Of what it holds now."""
        ...

    def reload(self, path: str) -> None:
        """Answer with these weights of the same kind from now on. The version is another one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Refreshing:
    """How the reward model of a run is trained further between iterations."""

    model: Reloads
    """That judges."""
    labels: Oracle
    """That it learns from."""
    path: str
    """Of the weights that the run began with."""
    objective: str
    """What they are trained for."""
    max_length: int
    """Of a sequence, in tokens."""
    every: int
    prompts: int
    min_new_labels: int
    mode: Mode
    replay: float
    recency: float
    heldout_share: float
    batch_size: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Responses of an iteration with what the other oracle says of them."""

    iteration: int
    group: Group
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """What came of a training."""

    weights: str | None
    """Its weights, see `RewardTrainer.path`; None where they are not taken, or nothing was trained."""
    reason: str | None
    """Why not; None where they are taken."""
    trained: int = 0
    """Comparisons that it was trained on; 0 where there was no training."""
    heldout: int = 0
    """Comparisons that it was measured on."""
    before: Interval | None = None
    """Accuracy on what is held out of the weights that it began with; the interval is over prompts."""
    after: Interval | None = None
    """Of the new ones."""
    change: Interval | None = None
    """The difference of both, on the same comparisons."""


class RewardTrainer(Protocol):
    """Who trains a reward model further."""

    def path(self, weights: str) -> Path:
        """The directory of weights that were taken, after every byte was compared with its checksum.

        Raises:
            StoreError: if they are not there, or damaged.
        """
        ...

    def train(
        self, iteration: int, began: str | None, since: int, labelled: Iterable[Labelled], tell: Callable[[int, int], None]
    ) -> Refreshed:
        """Train, or go on where a training of this iteration was stopped; what is finished is not computed again.

        Args:
            iteration: after which it is trained.
            began: the weights that are in use; None: those that the run began with.
            since: labels of later iterations are new.
            labelled: all that is known up to now, in the order of iterations and prompts.
            tell: is told after each optimizer step which of how many it was; what it raises ends the training.

        Raises:
            OnlineRLError: if it cannot be trained.
        """
        ...

    def keep(self, weights: Collection[str], before: int) -> None:
        """Remove what else trainings of the iterations before this one have left."""
        ...
