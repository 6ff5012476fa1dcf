"""Optimizer steps over comparisons, with checkpoints that a killed training goes on from exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onlinerl.controller.parts import learning_rates
from onlinerl.errors import LearnerError
from onlinerl.ops.schedule import schedule
from onlinerl.protocols.learner import Learner
from onlinerl.reward_training.checks import Checked
from onlinerl.reward_training.comparisons import Items
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.lines import Lines
from onlinerl.types import derive_seed

STEPS = "steps.jsonl"
"""One line for each optimizer step."""
Tell = Callable[[int, int, Mapping[str, float]], None]
"""Is told which step of how many was taken, and its figures."""


def train(checked: Checked, store: RunDirectory, learner: Learner, tell: Tell) -> None:
    """All steps that are left, from the newest checkpoint on. At the end there is one of the last step.

    Which comparisons a step has, and its learning rate, follow from the configuration alone; the learner's checkpoint has everything else.

    Raises:
        LearnerError: after too many steps whose gradient was not finite.
    """
    config, training = checked.config, checked.config.training
    items = Items(checked.train.comparisons, checked.reader)
    plan = schedule(len(items), training.batch_size, training.epochs, derive_seed(config.seed, "reward_model"))
    rates = learning_rates(training, 1, len(plan))
    lines = Lines(store.path / STEPS)
    done = max(store.artefacts("checkpoints"), default=0)
    if done:
        learner.load(store.require("checkpoints", done))
    lines.cut(done)  # what came after the checkpoint is computed again
    skipped = sum(int(json.loads(line)["skipped"]) for line in lines.read())
    for number in range(done, len(plan)):
        (report,) = learner.update([[items[i] for i in plan[number]]], [rates[number]])
        skipped += report.skipped
        if skipped > training.max_skipped_steps:
            raise LearnerError(
                f"{skipped} optimizer steps had a non-finite loss or gradient",
                field="training.learning_rate",
                fix="start again under another name with a lower learning rate; going on would repeat this",
            )
        figures = {**report.metrics[0], "tokens": report.tokens}
        lines.append(json.dumps({"step": number + 1, **_finite(figures)}))
        tell(number + 1, len(plan), figures)
        if (number + 1) % config.checkpoints.every == 0 or number + 1 == len(plan):
            save(checked, store, learner, number + 1)


def save(checked: Checked, store: RunDirectory, learner: Learner, step: int) -> None:
    """A checkpoint after this step; older ones than are kept go."""
    store.require_free(checked.state_bytes, int(checked.config.checkpoints.min_free_gib * 2**30))
    with store.staged("checkpoints", step) as path:
        store.require_files(path, learner.save(path))
    keep = store.artefacts("checkpoints")[-checked.config.checkpoints.keep :]
    store.retain("checkpoints", set(keep))


def export(store: RunDirectory, learner: Learner, step: int) -> Path:
    """The model as Hugging Face's classes read it."""
    if (there := store.artefact("exports", step)) is not None:
        return there
    with store.staged("exports", step) as path:
        learner.export(path)
    return store.require("exports", step)


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if abs(value) < float("inf") else None for name, value in figures.items()}
