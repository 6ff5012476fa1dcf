"""The only loop. Everything before it is wiring, everything below it is one iteration."""

from __future__ import annotations

from onlinerl.controller.iteration import Iteration, Weights
from onlinerl.controller.parts import Parts
from onlinerl.controller.report import Reporter


def run(parts: Parts, attempt: int = 0) -> int:
    """Run every iteration that is not finished. Returns how many were run; 0 means there was nothing left to do.

    Raises:
        OnlineRLError: of the boundary that failed; everything finished until then is on disk and `run` continues from it.
    """
    report = Reporter(parts.tracker, attempt)
    weights = Weights()
    done = 0
    for number in range(parts.config.iterations + 1):
        if "commit" in parts.store.phases(number):
            continue
        _restore(parts, weights, number)
        cursor = parts.store.phases(number - 1)["sample"]["next_cursor"] if number > 1 else 0
        Iteration(parts, number, weights, report, cursor).run()
        done += 1
    return done


def _restore(parts: Parts, weights: Weights, number: int) -> None:
    """Bring the learner to where iteration `number` goes on: after its training if that is safe on disk, else before it."""
    wanted = number if "checkpoint" in parts.store.phases(number) else number - 1
    if wanted <= 0 or weights.learner == wanted:
        return
    parts.learner.load(parts.store.require("checkpoints", wanted))
    weights.learner = wanted
