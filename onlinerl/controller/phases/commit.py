"""The last write of an iteration; then what is no longer needed may go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

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
    """The iterate that has surely gained most over the base model on the held-out prompts: the one whose 95 % interval has the highest lower bound,
    in reward, or in win rate where the oracle only compares, or rewards are of several versions of it and so of several scales. Of equals
    the earliest; the base model where no interval lies above 0. Where no iterate has a win rate, because nobody compared any, the newest.

    Args:
        measured: what `measure` recorded, by iterate.
    """
    later = [t for t in measured if t > 0]
    judges = {version for one in measured.values() for version in one.get("oracle_versions") or ()}
    scored = len(judges) < 2 and all(_known(_surely(measured, t, "reward")) for t in later)
    gained = {t: _surely(measured, t, "reward" if scored else "win_rate") for t in sorted(later)}
    worth: dict[int, Any] = {0: 0.0} | {t: value for t, value in gained.items() if _known(value)}
    if len(worth) == 1 and not scored:
        return max(measured)
    return max(worth, key=lambda t: float(worth[t]))


def _surely(measured: Mapping[int, Mapping[str, Any]], iterate: int, of: Literal["reward", "win_rate"]) -> Any:
    """What an iterate has gained at least; of runs of older versions, which did not record that, what it has gained on average."""
    one, base = measured[iterate], measured.get(0, {})
    if (gains := one.get("gains")) is not None:
        return gains[of]["low"]
    then, now = (0.5, (one.get("win_rate") or {}).get("value")) if of == "win_rate" else (base.get("reward"), one.get("reward"))
    return float(now) - float(then) if now is not None and then is not None else None


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
