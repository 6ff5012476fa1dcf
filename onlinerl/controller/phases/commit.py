"""The last write of an iteration; then what is no longer needed may go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onlinerl import graph
from onlinerl.controller.iteration import Iteration
from onlinerl.types import CommitRecord


def commit(it: Iteration) -> CommitRecord:
    """Remove old checkpoints, exports and references; the record says what became of the iterate."""
    config, store = it.parts.config, it.parts.store
    if it.number > 0:
        # Where the engine samples from older weights than the learner has, a resume needs both.
        kept = max(config.checkpoints.keep, 1 + config.schedule.max_lag)
        newer = range(it.number + 1, it.number + graph.IN_FLIGHT)
        checkpoints = [it.number - i for i in range(kept)]
        resumable = {*checkpoints, *newer}
        store.retain("checkpoints", resumable)
        if it.needs.auxiliary:  # each checkpoint goes on from the newest ones that were there with it
            store.retain("auxiliary", {*map(it.last_trained, checkpoints), *newer})
        if it.averaged:  # whoever goes on from a checkpoint needs the reference of the iteration after it
            store.retain("references", {it.reference(t + 1) or 0 for t in resumable if t >= 0})
        if config.checkpoints.exports != "all":
            reference = it.reference()
            saved = [] if reference is None or it.averaged else [reference]
            best = [_best(it)] if config.checkpoints.exports == "best" else []
            store.retain("exports", {it.number, it.number - 1, *newer, *saved, *best})
    idle = it.number > 0 and store.phases(it.number)["train"].get("idle") is not None
    return {"status": "keep" if idle else "promoted", "best": _best(it)}


def _best(it: Iteration) -> int:
    """The best iterate up to this one."""
    return best_iterate({t: it.parts.store.phases(t).get("measure", {}) for t in range(it.number + 1)})


def best_iterate(measured: Mapping[int, Mapping[str, Any]]) -> int:
    """The iterate with the highest reward on the held-out prompts; where the oracle only compares, with the highest win rate against the base
    model, of which the base model itself has a half. Of equals the earliest. Where no iterate has a win rate, because nobody compared
    any, the newest.

    Args:
        measured: what `measure` recorded, by iterate.
    """

    rewards = {t: one.get("reward") for t, one in measured.items()}
    rates = {t: (one.get("win_rate") or {"value": 0.5})["value"] for t, one in measured.items()}
    scored = all(map(_known, rewards.values()))
    worth: dict[int, Any] = {t: value for t, value in sorted((rewards if scored else rates).items()) if _known(value)}
    if len(worth) == 1 and not scored:
        return max(measured)
    return max(worth, key=lambda t: float(worth[t]))


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
