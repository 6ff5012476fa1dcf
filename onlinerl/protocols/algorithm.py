"""The role of algorithms: hyper-parameters, what they need, and a pure loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from onlinerl.protocols.component import Component

if TYPE_CHECKING:  # torch stays out of everything that only passes batches along, and what a loss does not read out of losses
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import LossOutput
    from onlinerl.protocols.needs import Needs
    from onlinerl.protocols.reported import Reported
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.plan import Objection, Plan
    from onlinerl.types.training import TrainItem, TrainSequence, Unit

Value = TypeVar("Value")
Reference = Literal["fixed", "previous", "none"]
"""A schedule: the base model, the policy at the start of the iteration, or nothing."""


def by_knobs(of: Callable[[Any], Value]) -> Value:
    """A declaration that depends on the knobs: a property, of which type checkers see what it returns."""
    return property(of)  # type: ignore[return-value]


class Algorithm(Component):
    """An algorithm is its hyper-parameters plus a pure loss. It is stateless and frozen: the configuration is the algorithm.

    Subclasses declare the class attributes and implement `items` and `loss`; the other methods are optional. A declaration that
    depends on a knob is a method of the same name under `by_knobs`.
    """

    metrics: ClassVar[tuple[Reported, ...]] = ()
    """What its loss and `figures` report and the catalogue (onlinerl/metrics) does not have."""
    unit: ClassVar[Unit]
    """What the summed loss is divided by the global count of."""
    needs: ClassVar[Needs]
    """What must be computed before `loss` can run."""
    reference: ClassVar[Reference]
    """The reference schedule that its paper uses."""
    loss_at_reference: ClassVar[float | None] = None
    """The loss per unit when policy and reference are the same, if the formula fixes it; the step-0 self-test checks it."""
    weighable: ClassVar[bool] = True
    """Whether what an item counts may be multiplied (`training.sample_weights`)."""

    def objection(self, plan: Plan) -> Objection | None:
        """What makes it pointless to run this as planned; None if nothing does."""
        return None

    def remarks(self, plan: Plan) -> list[str]:
        """What the knobs mean in this plan, where that is not what one might think."""
        return []

    def most_items(self, samples: int, pairs: int) -> int:
        """Upper bound of what `items` returns for a group of `samples` responses of which the builder makes at most `pairs`."""
        return pairs if self.needs.pairs else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Mapping[str, int]]:
        """What one judged group trains, and how much was left out for which reason. `pairs` is empty unless `needs.pairs`."""
        raise NotImplementedError

    def score(self, sequence: TrainSequence) -> float:
        """What a response earns: the oracle's score, unless the algorithm puts another one in its place."""
        return sequence.score

    def select(self, items: Sequence[TrainItem]) -> tuple[Sequence[int], Mapping[str, int]]:
        """Places of the items of the iteration that are trained, in their order, and how many were left out for which reason: what can be said
        only once log-probs are filled in, or all items are known. `prepare` gets those that are left."""
        return range(len(items)), {}

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """See all items of the iteration, with log-probs and values filled in: advantages, whitening, weights.

        `past` is what `figures` said in each earlier iteration, oldest first, read from the run directory. Items are on the disk and read
        when they are asked for: go through them as often as needed rather than keep them, and yield one by one what becomes of them.
        """
        return items

    def order(self, items: Sequence[TrainItem]) -> Sequence[Sequence[int]]:
        """Places of the items of each stage, every item in one: a stage is shuffled, cut into optimizer steps and trained
        `training.epochs` times before the next one. `items` are those that `prepare` made."""
        return [range(len(items))]

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Mapping[str, float]:
        """Finite figures of the whole iteration, from its items as `prepare` got them: reported, and kept for later iterations. What an
        algorithm must remember from one iteration to the next goes here, so that a resume remembers exactly the same."""
        return {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """The loss of one micro-batch as a sum over units."""
        raise NotImplementedError
