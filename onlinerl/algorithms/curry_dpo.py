"""Curry-DPO: "Curry-DPO: Enhancing Alignment using Curriculum Learning & Ranked Preferences"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pydantic import Field

from onlinerl.algorithms.dpo import Dpo
from onlinerl.protocols.algorithm import Needs, Reference, by_knobs
from onlinerl.types.training import TrainItem


class CurryDpo(Dpo):
    """DPO on the best response to a prompt against each other one (`pairing.name: best_rest` by default), from easy to hard: first the
    pair of each prompt whose scores differ most, last the one whose scores differ least. Each stage is trained `training.epochs` times.

    A departure from the paper, where the reference of a stage is the policy that the stage before ended with: here it is the one that the
    iteration began with in all stages. The optimizer goes on from stage to stage.
    """

    stages: int | None = Field(None, ge=1)
    """Into how many the pairs of a prompt are divided; as many as it has pairs by default. 1 trains them in any order."""

    @by_knobs
    def needs(self) -> Needs:
        """Of DPO, with its own pairs."""
        return super().needs.model_copy(update={"pairing": "best_rest"})

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
