"""The only loop. Each phase is durable before the next one starts:

    iteration 0:   sync - evaluate - commit
    iteration t:   sample - label - train - checkpoint - sync - evaluate - commit

A crash anywhere resumes at the first unfinished phase. Inside `sample`, `label` and `evaluate` every group is on disk as soon as it
is there, so nothing is generated or labelled twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from onlinerl.controller import health
from onlinerl.controller.iteration import Iteration, Weights
from onlinerl.controller.parts import Parts
from onlinerl.controller.phases.checkpoint import checkpoint
from onlinerl.controller.phases.commit import commit
from onlinerl.controller.phases.evaluate import evaluate
from onlinerl.controller.phases.label import label
from onlinerl.controller.phases.sample import sample
from onlinerl.controller.phases.sync import sync
from onlinerl.controller.phases.train import train
from onlinerl.controller.report import Reporter

Phase = Callable[[Iteration], dict[str, Any]]
BASE: Mapping[str, Phase] = {"sync": sync, "evaluate": evaluate, "commit": commit}
"""What happens to the base model, in order."""
PHASES: Mapping[str, Phase] = {"sample": sample, "label": label, "train": train, "checkpoint": checkpoint, **BASE}
"""What makes an iterate, in order."""


def run(parts: Parts, attempt: int = 0) -> int:
    """Run every iteration that is not finished. Returns how many were run; 0 means there was nothing left to do.

    Raises:
        OnlineRLError: of the boundary that failed; everything finished until then is on disk and `run` continues from it.
    """
    report = Reporter.of(parts, attempt)
    weights = Weights()
    done = 0
    for number in range(parts.config.iterations + 1):
        if "commit" in parts.store.phases(number):
            continue
        _restore(parts, weights, number)
        cursor = parts.store.phases(number - 1)["sample"]["next_cursor"] if number > 1 else 0
        it = Iteration(parts, number, weights, report, cursor)
        _finish(it)
        done += 1
        if 0 < number < parts.config.iterations:
            trained = parts.store.phases(number)["train"]
            health.check_idle(trained["idle_in_a_row"], parts.config.training.max_idle_iterations, trained["idle"] or "")
    return done


def _finish(it: Iteration) -> None:
    """Every phase of an iteration that is not finished yet."""
    store = it.parts.store
    done = store.phases(it.number)
    # Training changes weights in memory only: it counts from the moment its checkpoint is complete.
    if "train" in done and "checkpoint" not in done:
        done.pop("train")
    for name, phase in (PHASES if it.number > 0 else BASE).items():
        if name in done:
            continue
        started = time.monotonic()
        record = phase(it)
        seconds = time.monotonic() - started
        store.finish_phase(it.number, name, {"seconds": seconds, **record})
        it.parts.tracker.phase_finished(it.number, name, seconds)
        it.report.phase(it.number, name, seconds, record)


def _restore(parts: Parts, weights: Weights, number: int) -> None:
    """Bring the learner to where iteration `number` goes on: after its training if that is safe on disk, else before it."""
    wanted = number if "checkpoint" in parts.store.phases(number) else number - 1
    if wanted <= 0 or weights.learner == wanted:
        return
    parts.learner.load(parts.store.require("checkpoints", wanted))
    weights.learner = wanted
