"""Replicas that die, hang and lie, while a whole run goes on as if nothing had happened: the real controller, pool and push."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onlinerl import app, cli, resuming
from onlinerl import config as configuration
from onlinerl.cli import starting
from onlinerl.errors import ConfigError, EngineError, LearnerLost, OnlineRLError, StoreError
from onlinerl.protocols.engine import EngineConfig
from onlinerl.stores import scaling
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

pytest.importorskip("ray")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import recorded
import shared_gpu
import toy_fleet
from people import until
from toy_fleet import GARBAGE, Replica, World
from toy_runs import unpaid

from onlinerl.cluster.fleet import Fleet
from onlinerl.cluster.states import ReplicaState

REPLICAS = 3
FIRST_HELDOUT = 60


@dataclass
class Done:
    """A run that has ended."""

    world: World
    path: Path
    notes: str
    """What the console said."""
    error: OnlineRLError | None

    def tables(self) -> dict[str, Any]:
        """All that was sampled, answered and decided, and the weights that came out."""
        with RunDirectory.open(self.path) as store:
            rows = {
                f"{table} {t}": sorted(json.dumps(unpaid(row), sort_keys=True) for row in store.read(t, table))
                for t, table in ((1, "rollouts"), (1, "verdicts"), (0, "evaluation"), (1, "evaluation"))
            }
        weights = (self.path / "exports" / "0001" / "weights.json").read_text()
        return {**rows, "weights": weights}

    def deaths(self) -> list[str]:
        """Why replicas were given up, in order."""
        return re.findall(r"is given up \((\w+)\)", self.notes)

    def assert_healthy(self) -> None:
        assert self.error is None, f"{self.error}\n{self.notes}"
        assert [row["sync"]["proved"] for row in summarise(self.path)["iterations"]] == [True, True]
        versions = {row for name in ("rollouts 1", "evaluation 0") for row in self.tables()[name]}
        assert all(set(json.loads(row)["policy_versions"]) == {0} for row in versions)
        assert {v for row in self.tables()["evaluation 1"] for v in json.loads(row)["policy_versions"]} == {1}


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, toy_config: Any, tmp_path: Path) -> Iterator[Run]:
    """Runs, or resumes, one iteration with three replicas and these faults."""
    worlds: list[World] = []

    def start(world: World | None = None, *, folder: str = "a", resume: bool | Sequence[str] = False, **more: Any) -> Done:
        world = world or World()
        worlds.append(world)
        toy_fleet.install(monkeypatch, world)
        keys = {
            "iterations": 1,
            "engine.name": "vllm",
            "learner.name": "deepspeed",
            "engine.replicas": REPLICAS,
            "engine.max_num_seqs": 4,
            "cluster.device": "cpu",
            "metrics.prometheus": False,
            **more,
        }
        out, path = io.StringIO(), tmp_path / folder / "runs" / "toy"
        console = Console(file=out, width=400)
        error: OnlineRLError | None = None
        try:
            if resume is not False:
                app.resume(path, () if resume is True else resume, console)
            else:
                app.run(configuration.load(toy_config(tmp_path / folder, keys)), console)
        except OnlineRLError as raised:
            error = raised
        return Done(world=world, path=path, notes=out.getvalue(), error=error)

    yield start
    for world in worlds:
        world.gate.set()


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The tables of a run without a fault, once there are any."""
    return {}


@pytest.fixture
def undisturbed(run: Run, kept: dict[str, Any]) -> dict[str, Any]:
    if not kept:
        done = run(folder="undisturbed")
        done.assert_healthy()
        assert done.deaths() == []
        assert set(done.world.asked.values()) == {1, 2}, "held-out prompts are answered by two iterates"
        kept.update(done.tables())
    return kept


SYNC = ("init_weight_transfer_engine", "watch", "update_weights", "reset_caches", "received", "weight_version", "logprobs")
FAULTS = [
    *[((1, "sample", 2), fault, reason) for fault, reason in (("kill", "died"), ("hang", "hung"))],
    *[((1, "answer", 2), fault, reason) for fault, reason in (("kill", "died"), ("hang", "hung"))],
    *[((1, "sample", 1), fault, "garbage") for fault in GARBAGE],
    ((1, "answer", 1), "version", "garbage"),
    *[((1, method, 1), "kill", "push") for method in SYNC],
    ((1, "update_weights", 2), "kill", "push"),
    ((1, "update_weights", 2), "hang", "push"),
    ((1, "weight_version", 2), "hang", "push"),
    ((1, "received", 2), "other digests", "push"),
    ((1, "weight_version", 2), "other version", "push"),
    ((1, "logprobs", 2), "other weights", "push"),
]


@pytest.mark.parametrize(("moment", "fault", "reason"), FAULTS, ids=lambda each: str(each).replace(" ", ""))
def test_after_a_fault_the_run_ends_as_if_nothing_had_happened(
    run: Run, undisturbed: Any, moment: Any, fault: str, reason: str
) -> None:
    soon = {"engine.generate_timeout_s": 2.0, "sync.timeout_s": 5.0} if fault == "hang" else {}
    done = run(World({moment: fault}), **soon)

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert done.deaths() == [reason]
    assert done.world.ended == [1], "its process was ended for sure"
    in_hand = 1 + -(-4 // 1)  # of a replica that answers held-out prompts
    again = {prompt: n for prompt, n in done.world.asked.items() if n > (1 if int(prompt[1:]) < FIRST_HELDOUT else 2)}
    assert len(again) <= in_hand
    assert recorded.disagreements(done.path, "dpo") == []


@pytest.mark.parametrize("moment", [None, (1, "load_weights", 1), (1, "load_weights", 2), (1, "received", 2)], ids=str)
def test_pushes_through_files_end_in_the_same_run(run: Run, undisturbed: Any, moment: Any) -> None:
    """Also where a replica dies in one of them."""
    done = run(World({} if moment is None else {moment: "kill"}), **{"sync.backend": "disk"})

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert done.deaths() == ([] if moment is None else ["push"])
    with RunDirectory.open(done.path) as store:
        assert [store.phases(t)["sync"]["backend"] for t in (0, 1)] == ["disk", "disk"]
    assert not {method for _, method in done.world.calls if "update" in method or "transfer" in method}


CHAINS = {
    "two of three": {(0, "sample", 1): "kill", (2, "sample", 2): "kill"},
    "all of them": {(0, "sample", 1): "kill", (1, "sample", 2): "hang", (2, "sample", 1): "version"},
    "twice in a row": {(1, "sample", 1): "kill", (1, "answer", 5): "kill", (1, "answer", 6): "kill"},
    "during its start": {(1, "sample", 1): "kill", (1, "start", 2): "kill"},
    "while it is given weights": {(1, "sample", 1): "kill", (1, "load_weights", 1): "kill"},
    "with wrong weights": {(1, "sample", 1): "kill", (1, "logprobs", 2): "other weights"},
    "with weights altered on disk": {(1, "sample", 1): "kill", (1, "received", 2): "other digests"},
    "in a push, two of three": {(0, "update_weights", 2): "kill", (2, "received", 2): "kill"},
    "in a push, all of them": {(i, "update_weights", 2): "kill" for i in range(REPLICAS)},
    "in the same push again": {(1, "update_weights", 2): "kill", (0, "update_weights", 3): "kill"},
}


@pytest.mark.parametrize("name", CHAINS)
def test_several_faults(run: Run, undisturbed: Any, name: str) -> None:
    soon = {"engine.generate_timeout_s": 2.0} if "hang" in CHAINS[name].values() else {}
    done = run(World(CHAINS[name]), **soon)

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert all(done.world.calls[index, method] >= call for index, method, call in CHAINS[name]), "each of them was to happen"
    assert 1 <= len(done.deaths()) <= len(CHAINS[name])


# --- the budget, and the minimum ---


def test_without_restarts_the_first_one_ends_the_run(run: Run) -> None:
    done = run(World({(1, "sample", 2): "kill"}), **{"engine.max_restarts": 0})

    assert isinstance(done.error, EngineError)
    assert "replica 1" in done.error.cause
    assert "died" in done.error.cause


def test_when_restarts_are_used_up_the_run_goes_on_with_the_rest(run: Run, undisturbed: Any) -> None:
    faults = {(1, "sample", 1): "kill", (1, "start", 2): "kill"}
    done = run(World(faults), **{"engine.max_restarts": 1})

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert "replica 1 is not started again: engine.max_restarts=1 are used up" in done.notes


def test_when_too_few_are_left_the_error_names_field_cause_and_fix(run: Run) -> None:
    faults = {(1, "sample", 1): "kill", (1, "start", 2): "kill"}
    done = run(World(faults), **{"engine.max_restarts": 1, "engine.min_replicas": 3})

    assert isinstance(done.error, EngineError)
    assert done.error.field == "engine.max_restarts"
    assert "2 of 3 replicas are left, at least 3 must be" in done.error.cause
    assert "replica 1: its process died during starting the engine" in done.error.cause
    assert "onlinerl resume" in (done.error.fix or "")
    again = run(folder="a", resume=True)
    assert again.error is None


def test_below_the_minimum_nobody_is_asked_until_the_replica_is_back(run: Run, undisturbed: Any) -> None:
    world = World({(1, "sample", 1): "kill"})
    seen: list[int] = []

    def before(actor: Replica, method: str) -> None:
        if method == "start" and actor.number == REPLICAS:
            world.gate.clear()
            threading.Timer(0.3, look).start()
        if method == "sample" and not world.gate.is_set():
            seen.append(actor.index)

    def look() -> None:
        seen.clear()  # what was given at the moment of the death
        threading.Timer(0.3, world.gate.set).start()

    world.before = before
    done = run(world, **{"engine.min_replicas": 3})

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert seen == []


# --- what a replica that was down may do ---


def test_who_missed_a_push_serves_only_after_it_was_given_that_version(run: Run, undisturbed: Any) -> None:
    world = World({(1, "sample", 1): "kill"})
    events: list[str] = []

    def before(actor: Replica, method: str) -> None:
        if method == "start" and actor.number == REPLICAS:
            world.gate.clear()
        if method == "answer" and world.calls[0, "update_weights"] == 2 and actor.index == 0:
            world.gate.set()  # the others already answer with the version that it has missed
        if actor.number == REPLICAS:
            events.append(method)

    world.before = before
    done = run(world)

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert "update_weights" not in events
    if "answer" in events:
        assert events.index("load_weights") < events.index("logprobs") < events.index("answer")
    assert "sample" not in events


def test_a_model_without_finite_numbers_is_not_taken_for_a_bad_replica(run: Run) -> None:
    done = run(World({(1, "sample", 1): "nothing finite"}), **{"engine.max_rejected": 1.0})

    assert done.error is None
    assert done.deaths() == []


def test_a_replica_that_has_gone_bad_is_told_from_that_by_the_canary(run: Run, undisturbed: Any) -> None:
    done = run(World({(1, "sample", 1): "nothing finite", (1, "logprobs", 2): "other weights"}))

    done.assert_healthy()
    assert done.deaths() == ["garbage"]
    assert done.tables() == undisturbed


def test_a_prompt_that_nobody_can_answer_ends_the_run_and_no_replica(run: Run) -> None:
    done = run(World({(i, "sample", n): "raise" for i in range(REPLICAS) for n in range(1, 9)}))

    assert isinstance(done.error, EngineError)
    assert "division by zero" in done.error.cause
    assert done.deaths() == []


def test_all_replicas_that_cannot_prove_a_push_are_not_to_blame(run: Run) -> None:
    done = run(World({(i, "received", 2): "other digests" for i in range(REPLICAS)}))

    assert done.error is not None
    assert "3 of" not in done.notes
    assert "checked tensors are not what the learner holds" in done.error.cause
    assert done.deaths() == []


# --- figures ---


def test_deaths_restarts_and_states_are_figures(run: Run) -> None:
    done = run(World({(1, "sample", 1): "kill", (1, "start", 2): "kill"}))

    rows = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    deaths = [row["labels"] for row in rows if row["name"] == "replica_deaths"]
    restarts = [row["labels"] for row in rows if row["name"] == "replica_restarts"]
    assert [(d["replica"], d["reason"]) for d in deaths] == [("replica 1", "died"), ("replica 1", "start")]
    assert [r["reason"] for r in restarts] == ["died", "start"]
    states = [(row["labels"]["state"], row["value"]) for row in rows if row["name"] == "replicas"]
    assert ("dead", 1.0) in states
    assert ("serving", 3.0) in states


# --- more and fewer ---


def scaled(world: World, path: Path, number: int, *, at: int = 3) -> None:
    """Ask for so many replicas while iteration 1 samples."""
    seen: list[str] = []

    def before(actor: Replica, method: str) -> None:
        seen.append(method)
        if seen.count("sample") == at and method == "sample":
            starting.scale(path, number)

    world.before = before


def test_scaled_up_and_down_during_a_run(run: Run, undisturbed: Any, tmp_path: Path) -> None:
    path = tmp_path / "a" / "runs" / "toy"
    world = World()
    scaled(world, path, 5)
    up = run(world)
    up.assert_healthy()
    assert up.tables() == undisturbed
    assert len(world.actors) == 5
    assert "replica 4 is started: 5 replicas from now on" in up.notes
    assert configuration.load(path / "config.yaml").engine.replicas == 5

    world, path = World(), tmp_path / "b" / "runs" / "toy"
    scaled(world, path, 1)
    down = run(world, folder="b")
    down.assert_healthy()
    assert down.tables() == undisturbed
    assert "replica 1 is removed" in down.notes
    assert "replica 2 is removed" in down.notes
    assert sorted(world.ended) == [1, 2]
    assert down.deaths() == [], "who leaves finishes what it has in hand"
    assert configuration.load(path / "config.yaml").engine.replicas == 1


def test_a_resume_goes_on_with_the_new_number(
    run: Run, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: shared_gpu.Rank, path: str) -> Any:
        raise RuntimeError("planted")

    world = World()
    scaled(world, tmp_path / "a" / "runs" / "toy", 5)
    with monkeypatch.context() as patch:
        patch.setattr(shared_gpu.Rank, "do_save", fail)
        done = run(world)
    assert done.error is not None
    assert "planted" in done.error.cause

    again = run(resume=True)

    again.assert_healthy()
    assert again.tables() == undisturbed
    assert len(again.world.actors) == 5


def test_a_cluster_without_room_is_said_and_the_run_goes_on(run: Run, undisturbed: Any, tmp_path: Path) -> None:
    world = World(room=REPLICAS)
    scaled(world, tmp_path / "a" / "runs" / "toy", 4)
    done = run(world)

    done.assert_healthy()
    assert done.tables() == undisturbed
    assert "no room for replica 3: one more needs a CPU; the run goes on with 3" in done.notes
    assert configuration.load(done.path / "config.yaml").engine.replicas == REPLICAS


def test_a_wish_that_came_too_late_is_kept_for_the_resume_unless_that_says_another_number(
    run: Run, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: shared_gpu.Rank, path: str) -> Any:
        raise RuntimeError("planted")

    for folder, more, replicas in (("a", [], 5), ("b", ["engine.replicas=2"], 2)):
        with monkeypatch.context() as patch:
            patch.setattr(shared_gpu.Rank, "do_save", fail)
            assert run(folder=folder).error is not None
        scaling._files.replace_json(tmp_path / folder / "runs/toy/scale.json", {"replicas": 5})

        again = run(folder=folder, resume=more)

        again.assert_healthy()
        assert again.tables() == undisturbed
        assert len(again.world.actors) == replicas
        assert not (again.path / "scale.json").exists()
        assert configuration.load(again.path / "config.yaml").engine.replicas == replicas


def test_a_damaged_wish_is_named_and_stops_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "scale.json").write_text('{"format": 6, "replicas": 5}')
    with pytest.raises(StoreError, match=r"scale\.json is damaged") as caught:
        scaling.take(tmp_path)
    assert "onlinerl scale" in (caught.value.fix or "")
    assert scaling.take(tmp_path) is None


class Rooms:
    """A starter of replicas without processes, and which rooms are reserved."""

    def __init__(self) -> None:
        self.rooms: dict[int, object] = {}
        self.free, self.gone = threading.Event(), threading.Event()
        self.free.set()
        self.gone.set()

    def reserve(self, index: int) -> None:
        assert self.free.wait(30)
        self.rooms[index] = object()

    def release(self, index: int) -> None:
        self.rooms.pop(index, None)

    def open(self, replica: Any) -> None:
        replica.to(ReplicaState.STARTING)
        replica.actor = self

    def load(self, replica: Any) -> None:
        assert replica.actor is self


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Fleet, Rooms]]:
    """A fleet of one replica that serves."""
    starter = Rooms()
    monkeypatch.setattr("onlinerl.cluster.fleet.LOOK_S", 0.01)
    monkeypatch.setattr("onlinerl.cluster.replica.Replica.end", lambda replica: starter.gone.wait(30))
    fleet = Fleet(EngineConfig(), starter)  # type: ignore[arg-type]
    fleet.replicas[0].state = ReplicaState.SERVING
    yield fleet, starter
    starter.free.set()
    starter.gone.set()
    fleet.close()


def up(fleet: Fleet) -> list[int]:
    return [replica.index for replica in fleet.replicas if replica.state is not ReplicaState.DEAD]


def test_one_that_is_ending_keeps_its_room_and_takes_no_other_s_with_it(rooms: tuple[Fleet, Rooms]) -> None:
    fleet, starter = rooms
    fleet.resize(2)
    until(lambda: up(fleet) == [0, 1], "a second replica")
    starter.gone.clear()
    fleet.resize(1)
    fleet.resize(2)
    until(lambda: len(up(fleet)) == 2, "another one")
    starter.gone.set()
    until(lambda: not fleet._ending, "the room of the first one is given back")
    assert set(starter.rooms) == set(up(fleet)) - {0} == {2}
    fleet.resize(3)
    until(lambda: up(fleet) == [0, 2, 1], "its place is free again")


def test_the_place_of_one_that_is_gone_for_good_is_taken_first(rooms: tuple[Fleet, Rooms]) -> None:
    """There may be no other room in the cluster."""
    fleet, starter = rooms
    fleet.resize(3)
    until(lambda: up(fleet) == [0, 1, 2], "two more")
    gone = fleet.replicas[1]
    gone.state, gone.coming_back = ReplicaState.DEAD, False  # its restarts are used up
    fleet.resize(3)
    until(lambda: up(fleet) == [0, 2, 1], "another one")
    assert sorted(starter.rooms) == [1, 2]


def test_one_that_is_not_wanted_any_more_when_there_is_room_gives_it_back(rooms: tuple[Fleet, Rooms]) -> None:
    fleet, starter = rooms
    wanted: list[int] = []
    fleet.resized = wanted.append
    starter.free.clear()
    fleet.resize(2)
    fleet.resize(1)
    starter.free.set()
    until(lambda: not fleet._ending, "its index is free again")
    assert (starter.rooms, up(fleet), wanted) == ({}, [0], [1])


def test_scaling_is_refused_where_it_cannot_work(run: Run, tmp_path: Path) -> None:
    done = run(World({(1, "sample", 1): "kill"}), **{"engine.max_restarts": 0, "engine.min_replicas": 2})

    with pytest.raises(StoreError, match="is not running") as caught:
        resuming.scale(done.path, 5)
    assert "onlinerl resume" in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="would be fewer"):
        resuming.scale(done.path, 1)
    stored = (done.path / "config.yaml").read_text()
    (done.path / "config.yaml").write_text(stored.replace("colocate: false", "colocate: true"))
    with pytest.raises(ConfigError, match="ranks cannot be added"):
        resuming.scale(done.path, 5)


# --- the configuration, and the learner ---


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"engine.min_replicas": 4}, "engine.min_replicas"),
        (
            {"cluster.colocate": True, "cluster.device": "cuda", "engine.max_restarts": 2, "learner.ranks": 3},
            "engine.max_restarts",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(run: Run, keys: dict[str, Any], field: str) -> None:
    done = run(**keys)

    assert isinstance(done.error, ConfigError)
    assert done.error.field == field


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_ends_the_attempt_with_the_code_that_means_requeue(
    run: Run, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, how: str
) -> None:
    import ray
    from ray.exceptions import RayActorError

    from onlinerl.cluster import group, runtime

    def die(self: shared_gpu.Rank, *args: Any) -> Any:
        raise RayActorError

    def get(refs: Any, *, what: str, **more: Any) -> Any:
        if what == "step":
            assert more["timeout_s"] == 3600
            patch.setattr(ray, "wait", lambda refs, timeout, num_returns=1: ([], refs))  # what Ray says at the deadline
        return runtime.get(refs, what=what, **more)

    with monkeypatch.context() as patch:
        if how == "dies":
            patch.setattr(shared_gpu.Rank, "do_step", die)
            patch.setattr(shared_gpu, "RayTaskError", lambda name, text, cause: cause)
        else:
            patch.setattr(group, "get", get)
        done = run()
    assert isinstance(done.error, LearnerLost)
    assert done.error.started

    def raise_it() -> None:
        raise done.error or AssertionError

    monkeypatch.setattr(cli, "app", lambda standalone_mode: raise_it())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75
    again = run(resume=True)
    again.assert_healthy()
    assert again.tables() == undisturbed
