"""Where a run goes on: what is finished, and which weights belong into learner and engine."""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl import graph
from onlinerl.controller.iteration import Weights, push
from onlinerl.controller.parts import Parts
from onlinerl.controller.report import Reporter


def finished(parts: Parts) -> dict[int, set[str]]:
    """The phases of every iteration that need not run again."""
    done = {t: {*parts.store.phases(t)} for t in range(parts.config.iterations + 1)}
    # Training changes weights in memory only: it counts from the moment its checkpoint is complete.
    done = {t: names if "checkpoint" in names else names - {"train"} for t, names in done.items()}
    return graph.undone(parts.phases, done)


def restore(parts: Parts, done: Mapping[int, set[str]], report: Reporter) -> Weights:
    """Bring the learner to the newest checkpoint, and the engine to the newest weights that were pushed if it works before the next push.

    With `max_lag: 1` these can be older ones: the learner takes them on first, so that they are sent and proved as always.
    """
    weights = Weights()
    if all("commit" in phases for phases in done.values()):
        return weights
    pushed = max((t for t, phases in done.items() if "sync" in phases), default=None)
    if pushed is not None and _engine_works(parts, done, pushed):
        _load(parts, weights, pushed)
        push(parts, weights, report, pushed)
    _load(parts, weights, max((t for t, phases in done.items() if "checkpoint" in phases), default=0))
    return weights


def _engine_works(parts: Parts, done: Mapping[int, set[str]], version: int) -> bool:
    """Whether anything is left that a version has to answer or to sample."""
    lag = parts.config.schedule.max_lag
    sampled = [t for t in done if t > 0 and graph.sampling_version(t, lag) == version]
    return "answer" not in done[version] or any("sample" not in done[t] for t in sampled)


def _load(parts: Parts, weights: Weights, version: int) -> None:
    """Bring the learner, which starts as the base model, to an iterate."""
    if weights.learner != version:
        parts.learner.load(parts.store.require("checkpoints", version))
        weights.learner = version
