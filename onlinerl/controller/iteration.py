"""What the phases of one iteration share: its number, its prompts, and where which weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onlinerl.controller.parts import Parts, reference_iteration
from onlinerl.controller.report import Reporter
from onlinerl.errors import SyncError
from onlinerl.stores.rows import ROLLOUTS, group_from_row
from onlinerl.types import Failure, Group, Judged, Prompt, SyncReport, Verdict


@dataclass
class Weights:
    """Which version is where. The engine knows nothing at start, so the first push always happens (R-D2)."""

    learner: int = 0
    engine: int | None = None


@dataclass
class Iteration:
    """One iteration as its phases see it."""

    parts: Parts
    number: int
    weights: Weights
    report: Reporter
    cursor: int = 0
    """Where the prompts of this iteration start."""

    def prompts(self) -> tuple[list[Prompt], int]:
        """The prompts to train on, and the cursor of the next iteration."""
        return self.parts.train_prompts.take(self.parts.config.prompts.per_iteration, self.cursor)

    def groups(self) -> list[Group]:
        """What was sampled for training, in the order of the prompts: training must not depend on which response arrived first."""
        prompts, _ = self.prompts()
        by_id = {p.id: p for p in prompts}
        groups = {row["prompt_id"]: group_from_row(row, by_id) for row in self.parts.store.read(self.number, ROLLOUTS)}
        return [groups[p.id] for p in prompts]

    def idle_before(self) -> int:
        """How many iterations right before this one gave nothing to learn."""
        return self._train_record(self.number - 1).get("idle_in_a_row", 0)

    def trained_before(self) -> bool:
        """Whether any earlier iteration has taken an optimizer step."""
        return any(self._train_record(number).get("steps", 0) for number in range(1, self.number))

    def _train_record(self, number: int) -> dict[str, Any]:
        return self.parts.store.phases(number).get("train", {})

    def large_enough(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with as many usable responses as the algorithm needs."""
        return [g for g in groups if len(g.rollouts) >= self.parts.algorithm.needs.min_samples]

    def reference(self) -> int | None:
        """Which iterate the reference is; None if the algorithm needs none."""
        if not self.parts.algorithm.needs.reference:
            return None
        chosen = self.parts.config.reference
        schedule = self.parts.algorithm.reference if chosen.schedule == "default" else chosen.schedule
        return reference_iteration(schedule, chosen.every, self.number)

    def model_of(self, iterate: int) -> str:
        """Where the weights of an iterate are: "policy" if the learner holds them, else a path."""
        if iterate == self.weights.learner:
            return "policy"
        if iterate == 0:
            return self.parts.base_model
        return str(self.parts.store.require("exports", iterate))

    def ensure_engine(self) -> None:
        """After a restart the replicas hold the base model, whatever was believed before."""
        if self.weights.engine != self.weights.learner:
            self.push()

    def push(self) -> SyncReport:
        """Give the engine the learner's weights; that it failed is exported before it ends the run."""
        try:
            report = self.parts.sync.push(self.weights.learner)
        except SyncError:
            self.report.push_failed(self.number)
            raise
        self.weights.engine = self.weights.learner
        return report


def judged(groups: Sequence[Group], results: Mapping[str, Verdict | Failure]) -> list[Judged]:
    """Groups with a verdict; a failure is left out, never turned into a score."""
    return [Judged(group=g, verdict=v) for g in groups if isinstance(v := results[g.prompt.id], Verdict)]
