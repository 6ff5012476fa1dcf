"""The last write of an iteration; then what is no longer needed may go."""

from __future__ import annotations

from onlinerl import graph
from onlinerl.controller.iteration import Iteration
from onlinerl.types import CommitRecord


def commit(it: Iteration) -> CommitRecord:
    """Remove old checkpoints and exports; the record says what became of the iterate."""
    config, store = it.parts.config, it.parts.store
    if it.number > 0:
        # Where the engine samples from older weights than the learner has, a resume needs both.
        kept = max(config.checkpoints.keep, 1 + config.schedule.max_lag)
        newer = range(it.number + 1, it.number + graph.IN_FLIGHT)
        checkpoints = [it.number - i for i in range(kept)]
        store.retain("checkpoints", {*checkpoints, *newer})
        if it.needs.auxiliary:  # each checkpoint goes on from the newest ones that were there with it
            store.retain("auxiliary", {*map(it.last_trained, checkpoints), *newer})
        if config.checkpoints.exports == "last":
            reference = it.reference()
            store.retain("exports", {it.number, it.number - 1, *newer, *([] if reference is None else [reference])})
    idle = it.number > 0 and store.phases(it.number)["train"].get("idle") is not None
    return {"status": "keep" if idle else "promoted"}
