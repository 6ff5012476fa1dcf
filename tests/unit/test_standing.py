"""What stays up between runs, and that nothing of the run before is left in it: the real pool, fleet and push, on toy processes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onlinerl import app
from onlinerl import config as configuration
from onlinerl.errors import OnlineRLError, SyncError
from onlinerl.standing import Slot, Standing
from onlinerl.stores.directory import RunDirectory

pytest.importorskip("ray")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import shared_gpu
import toy_fleet
from toy_fleet import Replica, World

REPLICAS = 2


@pytest.fixture
def start(monkeypatch, toy_config, tmp_path):
    """Starts a run of one iteration in a world of replicas; returns its tables and weights."""

    def one(world: World, name: str, standing: Standing | None, **more: Any) -> dict[str, Any]:
        toy_fleet.install(monkeypatch, world)
        keys = {
            "iterations": 1,
            "engine.name": "vllm",
            "learner.name": "deepspeed",
            "engine.replicas": REPLICAS,
            "engine.max_num_seqs": 4,
            "cluster.device": "cpu",
            "metrics.prometheus": False,
            "training.batch_size": {"first": 4, "second": 2}[name],
            **more,
        }
        config = configuration.load(toy_config(tmp_path / ("alone" if standing is None else "sweep"), keys, name=name))
        app.run(config, Console(file=io.StringIO(), width=400), standing=standing)
        with RunDirectory.open(config.directory) as store:
            rows = {
                f"{table} {t}": sorted(json.dumps({**row, "cost": None}, sort_keys=True) for row in store.read(t, table))
                for t, table in ((1, "rollouts"), (1, "verdicts"), (0, "evaluation"), (1, "evaluation"))
            }
        weights = (config.directory / "exports" / "0001" / "weights.json").read_text()
        return {**rows, "weights": weights}

    return one


def test_the_replicas_stay_up_and_the_runs_are_those_that_start_their_own(start):
    world = World()
    with Standing() as standing:
        together = [start(world, name, standing) for name in ("first", "second")]
        assert len(world.actors) == REPLICAS
        assert all(actor.alive for actor in world.actors)
    assert not any(actor.alive for actor in world.actors)
    alone = [start(World(), name, None) for name in ("first", "second")]
    assert together == alone


def test_weights_of_the_run_before_are_never_taken_for_those_of_this_one(start, monkeypatch):
    """Planted: the replicas answer the first push of the second run, and keep what they have."""
    world, received = World(), []

    def update_weights(self, info, original=Replica.do_update_weights):
        received.append(self.number)
        if len(received) <= 2 * REPLICAS:
            original(self, info)

    monkeypatch.setattr(Replica, "do_update_weights", update_weights)
    with Standing() as standing:
        start(world, "first", standing)
        with pytest.raises(SyncError, match="the push of version 0 failed"):
            start(world, "second", standing)
    assert world.asked, "the first run did sample"


def test_a_replica_that_dies_before_the_first_push_gets_no_version_of_the_run_before(start):
    world = World({(1, "init_weight_transfer_engine", 2): "kill"})
    with Standing() as standing:
        start(world, "first", standing)
        again = start(world, "second", standing)
        assert len(world.actors) == REPLICAS + 1
    assert again == start(World(), "second", None)


@pytest.mark.parametrize("other", [{"engine.max_num_seqs": 8}, {"seed": 1}, {"sampling.max_new_tokens": 40}])
def test_another_engine_is_started_where_the_next_run_asks_for_one(start, other):
    world = World()
    with Standing() as standing:
        start(world, "first", standing)
        start(world, "second", standing, **other)
        assert [actor.alive for actor in world.actors] == [False] * REPLICAS + [True] * REPLICAS


def test_an_engine_that_has_lost_a_replica_ends_with_the_run(start):
    world = World({(1, "sample", 1): "kill"})
    with Standing() as standing:
        start(world, "first", standing)
        assert not any(actor.alive for actor in world.actors)
        start(world, "second", standing)
        assert sum(actor.alive for actor in world.actors) == REPLICAS


def test_a_run_that_fails_leaves_nothing_to_the_next_one(start):
    world = World({(index, "answer", 1): "raise" for index in range(REPLICAS)})
    with Standing() as standing:
        with pytest.raises(OnlineRLError):
            start(world, "first", standing, **{"engine.max_restarts": 0})
        assert not any(actor.alive for actor in world.actors)
        start(world, "second", standing)


def test_a_slot_closes_what_is_not_asked_for_again():
    closed = []

    class Thing:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> str:
            return self.name

        def __exit__(self, *_: object) -> None:
            closed.append(self.name)

    slot: Slot[str] = Slot()
    assert slot.take(("a", 1), lambda: Thing("first")) == ("first", False)
    assert slot.take(("a", 1), lambda: Thing("second")) == ("first", True)
    assert slot.take(("a", 2), lambda: Thing("third")) == ("third", False)
    assert closed == ["first"]
    slot.close()
    slot.close()
    assert closed == ["first", "third"]


def test_on_shared_gpus_the_engine_ends_with_the_run(monkeypatch, toy_config, tmp_path):
    """Whose turn it is there belongs to engine and learner together."""
    world = shared_gpu.World(shared=True)
    shared_gpu.install(monkeypatch, world, device="cuda")
    keys = {
        "iterations": 1,
        "engine.name": "vllm",
        "learner.name": "deepspeed",
        "cluster.colocate": True,
        "cluster.device": "cuda",
        "metrics.prometheus": False,
    }
    with Standing() as standing:
        for name in ("first", "second"):
            config = configuration.load(toy_config(tmp_path, keys, name=name))
            app.run(config, Console(file=io.StringIO()), standing=standing)
    assert world.events["gpu 0"].count("engine loads") == 2
