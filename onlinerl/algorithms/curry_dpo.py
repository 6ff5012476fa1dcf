"""Curry-DPO: "Curry-DPO: Enhancing Alignment using Curriculum Learning & Ranked Preferences"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms.dpo import Dpo
from onlinerl.protocols.algorithm import Reference, by_knobs
from onlinerl.types.plan import Objection, Plan

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.training import TrainItem


class CurryDpo(Dpo):
    """DPO on the best response to a prompt against each other one (`pairing.name: best_rest` by default), from easy to hard: first the
    pair of each prompt whose scores differ most, last the one whose scores differ least. Each stage is trained `training.epochs` times.

    The reference of the first stage is the policy that the iteration began with, and that of each other one the policy that the stage before
    ended with. The optimizer goes on from stage to stage, unless it is told otherwise.
    """

    stages: int | None = Field(None, ge=1)
    """Into how many the pairs of a prompt are divided; as many as it has pairs by default. 1 trains them in any order."""

    stage_reference: Literal["previous_stage", "iteration"] = "previous_stage"
    """The reference of a stage: as above, which costs a forward pass over its items, or in all stages the policy that the iteration began with."""
    stage_optimizer_state: Literal["keep", "reset"] = "keep"
    """What happens to the optimizer's moments where the reference changes from stage to stage; the paper does not say."""

    @field_validator("stage_optimizer_state")
    @classmethod
    def _is_read(cls, value: str, info: ValidationInfo) -> str:
        if value == "reset" and info.data.get("stage_reference") == "iteration":
            raise ValueError("only stage_reference=previous_stage reads it")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of DPO, with its own pairs."""
        moves = self.stage_reference == "previous_stage" and self.stages != 1 and not self.reference_free
        stage = self.stage_optimizer_state if moves else None
        return replace(super().needs, pairing="best_rest", stage_reference=stage)

    def objection(self, plan: Plan) -> Objection | None:
        """Another reference than the policy that training starts from, which only the first stage would have."""
        if not self.needs.stage_reference or all(iterate == t for t, iterate in enumerate(plan.references)):
            return super().objection(plan)
        cause = (
            "is previous_stage, and by reference.schedule the first stage of an iteration has another reference than its start"
        )
        return Objection(
            field="algorithm.stage_reference", cause=cause, fix="set it to iteration, or leave reference.schedule out"
        )

    @by_knobs
    def reference(self) -> Reference:
        """The policy that the iteration starts from, or none."""
        return "none" if self.reference_free else "previous"

    def order(self, items: Sequence[TrainItem]) -> list[list[int]]:
        """By stage, the items of each prompt by how much their scores differ (win rates, where the oracle gives no scores)."""
        # An item is read from the disk when it is asked for: once.
        gaps = [(item.prompt_id, item.sequences[0].score - item.sequences[1].score) for item in items]
        found: dict[int, list[int]] = {}
        for _, group in groupby(range(len(gaps)), key=lambda index: gaps[index][0]):  # the items of a prompt follow one another
            ranked = sorted(group, key=lambda index: -gaps[index][1])
            for rank, index in enumerate(ranked):
                found.setdefault(rank if self.stages is None else rank * self.stages // len(ranked), []).append(index)
        return [found[stage] for stage in sorted(found)]
