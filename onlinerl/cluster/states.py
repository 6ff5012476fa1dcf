"""What a replica can be doing, and what may follow what. A transition that is not in the table raises before anything is called."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from onlinerl.errors import EngineError


class ReplicaState(StrEnum):
    """One replica, at any time, is one of these."""

    STARTING = "starting"
    """Its process is being started and loads the model."""
    STALE = "stale"
    """Up, but it does not hold the current version, or has not proved that it does: it may not answer anybody."""
    UPDATING = "updating"
    """It is being given the current version, and then has to prove it."""
    SERVING = "serving"
    """It holds the current version, proved, and answers."""
    PAUSED = "paused"
    """It is being removed: it finishes what it has in hand and gets nothing new."""
    ASLEEP = "asleep"
    """On a shared GPU: its memory is the learner's."""
    DEAD = "dead"
    """There is no process, or it has been given up and is being ended."""


_S = ReplicaState
TRANSITIONS: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    _S.DEAD: frozenset({_S.STARTING}),
    _S.STARTING: frozenset({_S.STALE, _S.DEAD}),
    _S.STALE: frozenset({_S.UPDATING, _S.ASLEEP, _S.DEAD}),
    _S.UPDATING: frozenset({_S.SERVING, _S.STALE, _S.DEAD}),
    _S.SERVING: frozenset({_S.UPDATING, _S.PAUSED, _S.ASLEEP, _S.DEAD}),
    _S.PAUSED: frozenset({_S.DEAD}),
    _S.ASLEEP: frozenset({_S.STALE, _S.SERVING, _S.DEAD}),
}
"""From each state, the states that may follow. Serving is only reached through an update, or from a sleep without one."""


def require(name: str, now: ReplicaState, then: ReplicaState) -> None:
    """Refuse a transition that is not in the table.

    Raises:
        EngineError: naming the replica and both states.
    """
    if then not in TRANSITIONS[now]:
        legal = ", ".join(sorted(TRANSITIONS[now]))
        raise EngineError(
            f"{name} is {now} and cannot become {then} (only {legal})",
            field="engine.replicas",
            fix="this is a bug of onlinerl; `onlinerl resume` starts fresh replicas",
        )
