"""The role of algorithms: hyper-parameters, what they need, and a pure loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from onlinerl.protocols.component import Component
from onlinerl.types import Judged, Pair, TrainItem, Unit

if TYPE_CHECKING:  # torch stays out of everything that only passes batches along
    from onlinerl.batch import Batch, LossOutput, Outputs


class Needs(BaseModel):
    """What an algorithm must be given; the controller computes nothing that nobody asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: bool = False
    """Pairs built by the configured pair builder."""
    reference: bool = False
    """Reference log-probs."""
    old: bool = False
    """Log-probs of the learner's own weights before the first step."""
    values: bool = False
    """A critic."""
    entropy: bool = False
    min_samples: int = 1
    """Fewest responses per prompt that make sense."""
    preferences: bool = False
    """How probable it is that one response beats another (win rates, soft labels); scores alone only imply it."""
    kl_in_reward: bool = False
    """The reference acts only through `old` against `reference` log-probs, so only where the two are different weights."""
    critic_warmup: int = 0
    """Iterations at the start in which the policy does not learn."""


class Algorithm(Component):
    """An algorithm is its hyper-parameters plus a pure loss. It is stateless and frozen: the configuration is the algorithm.

    Subclasses set the class attributes and implement `items` and `loss`; `prepare` is optional.
    """

    def needs(self) -> Needs:
        """What must be computed before `loss` can run."""
        raise NotImplementedError

    @property
    def unit(self) -> Unit:
        """What the summed loss is divided by the global count of."""
        raise NotImplementedError

    @property
    def default_reference(self) -> Literal["fixed", "previous", "none"]:
        """The reference schedule its paper uses."""
        raise NotImplementedError

    @property
    def loss_at_reference(self) -> float | None:
        """The loss per unit when policy and reference are the same, if the formula fixes it; the step-0 self-test checks it."""
        return None

    @property
    def policy_gradient(self) -> bool:
        """True if log-probs must be taken at the sampling temperature; preference losses use temperature 1."""
        return False

    def most_items(self, samples: int, pairs: int) -> int:
        """Upper bound of what `items` returns for a group of `samples` responses of which the builder makes at most `pairs`."""
        return pairs if self.needs().pairs else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Mapping[str, int]]:
        """Turn one judged group into what is trained, and say how much of it was left out for which reason.

        `pairs` is empty unless `needs().pairs`.
        """
        raise NotImplementedError

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> list[TrainItem]:
        """See all items of the iteration at once, with log-probs and values filled in: advantages, whitening, weights.

        `past` is what `figures` said in each earlier iteration, oldest first, read from the run directory.
        """
        return list(items)

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Mapping[str, float]:
        """Finite figures of the whole iteration, from its items as `prepare` got them: reported, and kept for later iterations.

        What an algorithm must remember from one iteration to the next goes here, so that a resume remembers exactly the same.
        """
        return {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """The loss of one micro-batch as a sum over units."""
        raise NotImplementedError
