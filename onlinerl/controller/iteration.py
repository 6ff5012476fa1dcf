"""What the phases of one iteration share: its number, its prompts, what they hand to each other, and where which weights are."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onlinerl import graph
from onlinerl.controller import health
from onlinerl.controller.feed import Feed, Stopped
from onlinerl.controller.parts import Parts, reference_iteration
from onlinerl.controller.report import Reporter
from onlinerl.errors import SyncError
from onlinerl.stores.rows import ROLLOUTS, VERDICTS, group_from_row, result_from_row
from onlinerl.types import Failure, Group, Judged, Prompt, SyncReport, Verdict

Answer = Verdict | Failure | None
"""What is known about a group once it has been dealt with; None: it was too small to be judged."""


@dataclass
class Weights:
    """Which version is where. The engine knows nothing at start, so the first push always happens."""

    learner: int = 0
    engine: int | None = None


@dataclass
class Iteration:
    """One iteration as its phases see it."""

    parts: Parts
    number: int
    weights: Weights
    report: Reporter
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the run is being stopped."""

    def __post_init__(self) -> None:
        self.rollouts: Feed[Group] = Feed(self.stop)
        """What `sample` has made so far; read it through `sampled`."""
        self.answers: Feed[tuple[Group, Answer]] = Feed(self.stop)
        """What `label` has dealt with so far; read it through `labelled`."""

    def check_stop(self) -> None:
        """Between two things that are durable one by one.

        Raises:
            Stopped: if the run is being stopped.
        """
        if self.stop.is_set():
            raise Stopped

    def finished(self, phase: str) -> None:
        """Whoever follows a phase may come to an end."""
        if phase == "sample":
            self.rollouts.close()
        if phase == "label":
            self.answers.close()

    @property
    def cursor(self) -> int:
        """Where the prompts of this iteration start."""
        return self.parts.store.phases(self.number - 1)["sample"]["next_cursor"] if self.number > 1 else 0

    @property
    def sampling_version(self) -> int:
        """Which weights this iteration is sampled from."""
        return graph.sampling_version(self.number, self.parts.config.schedule.max_lag)

    def prompts(self) -> tuple[list[Prompt], int]:
        """The prompts to train on, and the cursor of the next iteration."""
        return self.parts.train_prompts.take(self.parts.config.prompts.per_iteration, self.cursor)

    def groups(self) -> list[Group]:
        """What was sampled for training, in the order of the prompts: training must not depend on which response arrived first."""
        prompts, _ = self.prompts()
        by_id = {p.id: p for p in prompts}
        groups = {row["prompt_id"]: group_from_row(row, by_id) for row in self.parts.store.read(self.number, ROLLOUTS)}
        return [groups[p.id] for p in prompts]

    def sampled(self) -> Feed[Group]:
        """The groups: in the order of the prompts if all are there, else as they come."""
        if "sample" in self.parts.store.phases(self.number):
            return Feed.of(self.groups(), self.stop)
        return self.rollouts

    def results(self) -> dict[str, Verdict | Failure]:
        """What the oracle has said so far, by prompt id."""
        return dict(result_from_row(row) for row in self.parts.store.read(self.number, VERDICTS))

    def labelled(self) -> Feed[tuple[Group, Answer]]:
        """The groups with what is known about them: in the order of the prompts if all are there, else as they come."""
        if "label" in self.parts.store.phases(self.number):
            results = self.results()
            return Feed.of([(group, results.get(group.prompt.id)) for group in self.groups()], self.stop)
        return self.answers

    def idle_before(self) -> int:
        """How many iterations right before this one gave nothing to learn."""
        return self._train_record(self.number - 1).get("idle_in_a_row", 0)

    def check_idle(self) -> None:
        """After its last phase. The last iteration ends the run anyway.

        Raises:
            OracleError: if too many iterations in a row gave nothing to learn.
        """
        if 0 < self.number < self.parts.config.iterations:
            health.check_idle(self._train_record(self.number), self.parts.config.training.max_idle_iterations)

    def trained_before(self) -> bool:
        """Whether any earlier iteration has taken an optimizer step."""
        return any(self._train_record(number).get("steps", 0) for number in range(1, self.number))

    def _train_record(self, number: int) -> dict[str, Any]:
        return self.parts.store.phases(number).get("train", {})

    def large_enough(self, group: Group) -> bool:
        """Whether a group has as many usable responses as the algorithm needs."""
        return len(group.rollouts) >= self.parts.algorithm.needs.min_samples

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

    def push(self) -> SyncReport:
        """Give the engine the learner's weights; that it failed is exported before it ends the run."""
        return push(self.parts, self.weights, self.report, self.number)


def push(parts: Parts, weights: Weights, report: Reporter, iteration: int) -> SyncReport:
    """Give the engine the learner's weights; that it failed is exported before it ends the run.

    Raises:
        SyncError: if it failed.
    """
    weights.engine = None
    try:
        pushed = parts.sync.push(weights.learner)
    except SyncError:
        report.push_failed(iteration)
        raise
    weights.engine = weights.learner
    return pushed


def judged(groups: Sequence[Group], results: Mapping[str, Verdict | Failure]) -> list[Judged]:
    """Groups with a verdict; a failure is left out, never turned into a score."""
    return [Judged(group=g, verdict=v) for g in groups if isinstance(v := results.get(g.prompt.id), Verdict)]
