"""The role of prompt selectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from onlinerl.protocols.component import Component

if TYPE_CHECKING:
    from onlinerl.types.plan import Objection
    from onlinerl.types.selection import Pool, Selected, SelectionPlan


class Selector(Component):
    """Chooses the prompts of an iteration, and their order."""

    name: str = ""
    chooses: ClassVar[bool] = True
    """False: prompts are taken in the order that the run gives them, so nothing is asked and nothing stored."""

    @property
    def reads_scores(self) -> bool:
        """Whether it goes by what the oracle has said, so that the oracle must score single responses."""
        return False

    @property
    def components(self) -> tuple[str, ...]:
        """Other scores that it reads, by name (`Visit.components`), so that the oracle must give them; it then `reads_scores`."""
        return ()

    @property
    def reads_first_visits(self) -> bool:
        """Whether it reads what was said at the first visit to a prompt too."""
        return False

    @property
    def reuses(self) -> bool:
        """Whether responses of earlier iterations may be trained on once more (`Selected.reused_from`); it then `reads_scores`."""
        return False

    def select(self, pool: Pool) -> Sequence[Selected]:
        """The prompts of an iteration in their order, none twice: `pool.most` of them, or fewer, but never less than `pool.per_iteration`.

        It depends on `pool` only. Chance comes from `derive_seed(pool.seed, pool.iteration, ...)`.
        """
        raise NotImplementedError

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """Why a run cannot be selected for as planned, or None."""
        return None

    def most_sampled(self, plan: SelectionPlan) -> int:
        """How many prompts a run samples at most, all iterations together: without those whose responses are reused in any case."""
        return plan.iterations * plan.rounds * plan.per_iteration
