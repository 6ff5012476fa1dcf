"""Where a run goes on: what is finished, and which weights belong into learner and engine."""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl.controller.iteration import Weights, push
from onlinerl.controller.parts import Parts
from onlinerl.controller.report import Reporter
from onlinerl.protocols.store import Store


def finished(store: Store, iteration: int) -> set[str]:
    """The phases of an iteration that need not run again."""
    done = {*store.phases(iteration)}
    # Training changes weights in memory only: it counts from the moment its checkpoint is complete.
    return done if "checkpoint" in done else done - {"train"}


def restore(parts: Parts, done: Mapping[int, set[str]], report: Reporter) -> Weights:
    """Bring the learner to the newest checkpoint, and the engine to the same weights if it works before the next push."""
    weights = Weights(learner=max((t for t, phases in done.items() if "checkpoint" in phases), default=0))
    now, unfinished = weights.learner, [t for t, phases in done.items() if "commit" not in phases]
    if not unfinished:
        return weights
    if now:
        parts.learner.load(parts.store.require("checkpoints", now))
    following = now + 1
    engine_works = "answer" not in done[now] or (following in done and "sample" not in done[following])
    if "sync" in done[now] and engine_works:
        push(parts, weights, report, now)
    return weights
