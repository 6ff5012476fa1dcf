"""The states of a replica: what may follow what."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from onlinerl.errors import EngineError

states = pytest.importorskip("onlinerl.cluster.states")
replica_module = pytest.importorskip("onlinerl.cluster.replica")
State = states.ReplicaState


@pytest.mark.parametrize(("now", "then"), product(State, State))
def test_what_is_not_in_the_table_is_refused(now, then):
    if then in states.TRANSITIONS[now]:
        states.require("replica 1", now, then)
        return
    with pytest.raises(EngineError, match=f"replica 1 is {now} and cannot become {then}"):
        states.require("replica 1", now, then)


def test_nobody_serves_without_an_update_and_nobody_rises_without_a_start():
    before = {state: {s for s in State if state in states.TRANSITIONS[s]} for state in State}
    assert before[State.SERVING] == {State.UPDATING, State.ASLEEP}
    assert before[State.UPDATING] == {State.STALE, State.SERVING}
    assert states.TRANSITIONS[State.DEAD] == {State.STARTING}
    assert all(State.DEAD in states.TRANSITIONS[s] for s in State if s is not State.DEAD), "each of them may die"


def test_an_illegal_start_is_refused_before_a_process_is_started(monkeypatch):
    started = []
    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: started.append(1)))
    monkeypatch.setattr(replica_module, "ReplicaActor", actor)
    replica = replica_module.Replica(0)
    replica.open({})
    with pytest.raises(EngineError, match="is starting and cannot become starting"):
        replica.open({})
    assert started == [1]


@pytest.mark.parametrize("state", [State.ASLEEP, State.PAUSED, State.STALE])
def test_nobody_waits_for_replicas_that_are_not_on_the_way(state):
    config = SimpleNamespace(replicas=2, max_restarts=3, min_replicas=1)
    fleet = pytest.importorskip("onlinerl.cluster.fleet").Fleet(config, SimpleNamespace())
    for replica in fleet.replicas:
        replica.state = state
    with pytest.raises(EngineError, match=f"replica 1 is {state}"):
        fleet.able()
    if state is not State.STALE:
        with pytest.raises(EngineError, match=f"replica 1 is {state}"):
            fleet.begin_update()
