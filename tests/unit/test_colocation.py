"""Engine and learner on shared GPUs: the real controller, pool, group and push, on processes that record what they are asked for."""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onlinerl import app
from onlinerl import config as configuration
from onlinerl.errors import ClusterError, ConfigError, EngineError, OnlineRLError, SyncError
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

pytest.importorskip("ray")
pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import shared_gpu

from onlinerl.cluster import colocation, fleet
from onlinerl.cluster.colocation import STEPS, Turns

START = ["engine loads", "engine sleeps", "learner loads"]
PUSH = [
    "learner gives log-probs",
    "learner leaves: optimizer",
    "engine wakes: weights",
    "engine receives",
    "learner leaves: all",
    "engine wakes: kv_cache",
    "engine gives log-probs",
]
TO_ENGINE = ["learner leaves: all", "engine wakes: all"]
TO_LEARNER = ["engine sleeps", "learner returns"]
SAMPLE = ["engine generates"]
TRAIN = ["learner gives log-probs", "learner tests itself", "learner steps"]
CHECKPOINT = ["learner exports", "learner saves"]
EVALUATE = ["engine generates", *TO_LEARNER, "learner gives log-probs"]

Run = Callable[..., shared_gpu.World]


class Stopped(Exception):
    """Ends a run where a test wants it to end."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, toy_config: Any, tmp_path: Path) -> Run:
    """Runs or resumes a run of one iteration; `stop_in`: the phase of iteration 1 that is done but not written down."""

    def start(
        *, shared: bool = True, stop_in: str = "", fail: Any = None, dies: Any = None, resume: bool = False, **more: Any
    ) -> shared_gpu.World:
        world = shared_gpu.World(shared=shared)
        world.fail, world.dies = fail or world.fail, dies or world.dies
        shared_gpu.install(monkeypatch, world, device="cuda" if shared else "cpu")
        finish = RunDirectory.finish_phase

        def finish_phase(self: RunDirectory, iteration: int, phase: str, record: Any) -> None:
            if (iteration, phase) == (1, stop_in):
                raise Stopped
            finish(self, iteration, phase, record)

        keys = {
            "iterations": 1,
            "engine.name": "vllm",
            "learner.name": "deepspeed",
            "engine.replicas": 2,
            "learner.ranks": 2,
            "cluster.colocate": shared,
            "cluster.device": "cuda" if shared else "cpu",
            "metrics.prometheus": False,
            **more,
        }
        console = Console(file=io.StringIO())
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "finish_phase", finish_phase)
            if resume:
                app.resume(tmp_path / "runs" / "toy", [], console)
            else:
                app.run(configuration.load(toy_config(tmp_path, keys)), console)
        return world

    return start


def once(events: list[str]) -> list[str]:
    """Without repetitions, as they are recorded."""
    return [e for e, before in zip(events, [None, *events], strict=False) if e != before]


def assert_recorded(world: shared_gpu.World, *expected: list[str]) -> None:
    assert world.events.keys() == {"gpu 0", "gpu 1"}
    for events in world.events.values():
        assert events == once(list(chain(*expected)))


# --- a whole run ---


def test_an_iteration_on_shared_gpus(run: Run, tmp_path: Path) -> None:
    world = run()

    assert_recorded(world, START, PUSH, EVALUATE, TO_ENGINE, SAMPLE, TO_LEARNER, TRAIN, CHECKPOINT, PUSH, EVALUATE)
    assert [row["sync"]["proved"] for row in summarise(tmp_path / "runs" / "toy")["iterations"]] == [True, True]


def test_without_shared_gpus_turns_are_taken_and_nothing_is_moved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    move = Turns.move

    def watched(self: Turns, turn: Any, timeout_s: float | None = None) -> None:
        move(self, turn, timeout_s)
        turns.append(self.turn)

    monkeypatch.setattr(Turns, "move", watched)
    apart = run(shared=False)
    taken, turns[:] = list(turns), []
    run(name="shared")

    assert taken == turns
    everything = set(chain(*apart.events.values()))
    assert not {e for e in everything if any(word in e for word in ("sleep", "wake", "leave", "return"))}
    assert {"engine receives", "engine generates", "learner steps", "learner saves"} <= everything


def test_only_replicas_that_share_a_gpu_may_unpickle_handles(run: Run) -> None:
    variable = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    shared = run().environments
    assert [shared[f"replica {i}"].get(variable) for i in range(2)] == ["1", "1"]
    assert all(variable not in env for env in run(shared=False, name="apart").environments.values())


# --- a resume in every phase, which finds both parts freshly started ---

AFTER = {
    "sample": [*PUSH, *TO_LEARNER, *TRAIN, *CHECKPOINT, *PUSH, *EVALUATE],
    "label": [*TRAIN, *CHECKPOINT, *PUSH, *EVALUATE],
    "annotate": [*TRAIN[1:], *CHECKPOINT, *PUSH, *EVALUATE],
    "train": [*TRAIN[1:], *CHECKPOINT, *PUSH, *EVALUATE],
    "checkpoint": [*TRAIN[1:], *CHECKPOINT, *PUSH, *EVALUATE],
    "sync": ["learner restores", *PUSH, *EVALUATE],
    "answer": ["learner restores", *PUSH, *TO_LEARNER, "learner gives log-probs"],
    "measure": ["learner restores", "learner gives log-probs"],
    "commit": ["learner restores"],
}


@pytest.mark.parametrize("phase", AFTER)
def test_a_resume_takes_turns_as_the_run_did(run: Run, tmp_path: Path, phase: str) -> None:
    with pytest.raises(Stopped):
        run(stop_in=phase)

    world = run(resume=True)

    assert_recorded(world, START, AFTER[phase])
    assert [row["status"] for row in summarise(tmp_path / "runs" / "toy")["iterations"]] == ["promoted", "promoted"]


# --- a push that fails ---


@pytest.mark.parametrize("moment", PUSH[:-1])
def test_a_failed_push_ends_the_run_and_a_resume_goes_on(run: Run, moment: str) -> None:
    with pytest.raises(SyncError, match=shared_gpu.BROKEN):
        run(fail=lambda who, what: (who, what) == ("gpu 1", moment))

    assert_recorded(run(resume=True), START, PUSH, EVALUATE, TO_ENGINE, SAMPLE, TO_LEARNER, TRAIN, CHECKPOINT, PUSH, EVALUATE)


def test_a_replica_that_never_proves_its_weights_is_given_up_and_the_others_go_on(run: Run, tmp_path: Path) -> None:
    world = run(fail=lambda who, what: (who, what) == ("gpu 1", PUSH[-1]))

    assert [row["sync"]["proved"] for row in summarise(tmp_path / "runs" / "toy")["iterations"]] == [True, True]
    assert [world.events[gpu].count("engine loads") for gpu in ("gpu 0", "gpu 1")] == [1, 1 + fleet.RESTARTS]


# --- a replica that dies ---


def at(moment: str, occurrence: int = 1) -> Callable[[str, str], bool]:
    """The engine on GPU 1 dies the n-th time that it is asked for something."""
    seen = itertools.count(1)
    return lambda who, what: (who, what) == ("gpu 1", moment) and next(seen) == occurrence


BEFORE_IT_COMES_BACK = {
    ("engine generates", 1): {"engine generates"},
    ("engine generates", 12): {"engine generates"},
    ("engine sleeps", 2): {"learner leaves: all"},
    ("engine wakes: weights", 2): {"learner leaves: all"},
    ("engine wakes: kv_cache", 2): {
        "engine wakes: kv_cache",
        "learner leaves: all",
    },  # at once, or when the push was sent again
    ("engine wakes: all", 1): {"engine wakes: all"},
}
"""When it dies, and what has happened on its GPU right before it loads again: never while the learner is there."""


@pytest.mark.parametrize("moment", BEFORE_IT_COMES_BACK, ids=lambda moment: f"{moment[0]}, {moment[1]}")
def test_a_replica_that_dies_comes_back_when_the_learner_has_left(run: Run, tmp_path: Path, moment: tuple[str, int]) -> None:
    world = run(dies=at(*moment), iterations=2)

    assert [row["sync"]["proved"] for row in summarise(tmp_path / "runs" / "toy")["iterations"]] == [True] * 3
    there, struck = world.events["gpu 0"], world.events["gpu 1"]
    assert (there.count("engine loads"), struck.count("engine loads")) == (1, 2)
    again = struck.index("engine loads", 1)
    assert struck[again - 1] in BEFORE_IT_COMES_BACK[moment]
    assert struck[again + 1] == "engine loads a version"
    assert struck[-4:] == there[-4:], "it takes part again"


def test_a_replica_that_starts_while_the_learner_returns_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wait before a change of turns is for: without it, both are on the GPU."""
    loads = shared_gpu.Replica.on_start

    def slow(self: Any, *args: Any) -> None:
        if self.world.events:
            time.sleep(0.3)
        loads(self, *args)

    monkeypatch.setattr(shared_gpu.Replica, "on_start", slow)
    assert run(dies=at("engine generates", 12), name="waits").events["gpu 1"].count("engine loads") == 2
    monkeypatch.setattr(fleet.Fleet, "settle", lambda self, timeout_s: None)
    with pytest.raises(OnlineRLError, match=r"CUDA|is starting and cannot become|is stale and cannot become"):
        run(dies=at("engine generates", 12), name="does-not-wait")


def test_the_only_replica_dies_asleep_and_a_resume_goes_on(run: Run, tmp_path: Path) -> None:
    """Nobody is there to be pushed to, and it can only start when the push is over."""
    one = {"engine.replicas": 1, "learner.ranks": 1}
    dies = at("engine wakes: weights", 2)
    with pytest.raises(SyncError, match="at least 1 replicas are needed, and replica 0 is dead") as error:
        run(dies=lambda who, what: dies("gpu 1" if who == "gpu 0" else who, what), **one)
    assert "onlinerl resume" in error.value.fix

    run(resume=True)

    assert [row["status"] for row in summarise(tmp_path / "runs" / "toy")["iterations"]] == ["promoted", "promoted"]


# --- the table has no step too many, and none in the wrong place ---

MUTATIONS = {
    f"{' -> '.join(change)}, {name}": (change, mutated)
    for change, steps in STEPS.items()
    if change != ("both", "learner")  # only after a failed push, see below
    for name, mutated in (
        ("swapped", tuple(reversed(steps))),
        *((f"without {step!r}", tuple(s for s in steps if s != step)) for step in steps),
    )
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_step_left_out_or_swapped_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    change, steps = MUTATIONS[mutation]
    monkeypatch.setattr(colocation, "STEPS", {**STEPS, change: steps})

    # By the GPU, or by the states of the replicas before it.
    with pytest.raises(OnlineRLError, match=r"CUDA|replica 0 is asleep"):
        run()


def test_a_start_side_by_side_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "engine_starts", lambda self, engine: setattr(self, "_engine", engine))

    with pytest.raises(OnlineRLError, match="CUDA out of memory"):
        run()


# --- the turns alone ---


class Part:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.broken = log, name, False

    def wait_started(self, meanwhile: Callable[[], None] | None = None) -> None:
        if meanwhile is not None:
            meanwhile()
        self.log.append(f"{self.name} started")

    def require_starting(self) -> None:
        self._do("looked at")

    def _do(self, what: str) -> None:
        if self.broken:
            raise EngineError("no memory", fix="none")
        self.log.append(f"{self.name} {what}")

    def sleep(self, timeout_s: float | None = None) -> None:
        self._do("sleep")

    def wake_up(self, what: str, timeout_s: float | None = None) -> None:
        self._do(f"wake {what}")

    def offload(self, what: str, timeout_s: float | None = None) -> None:
        self._do(f"offload {what}")

    def reload(self, timeout_s: float | None = None) -> None:
        self._do("reload")


@pytest.fixture
def parts() -> tuple[Turns, Part, Part, list[str]]:
    log: list[str] = []
    engine, learner, turns = Part(log, "engine"), Part(log, "learner"), Turns(shared=True)
    turns.engine_starts(engine)
    turns.learner_starts(learner)
    return turns, engine, learner, log


def test_the_engine_sleeps_before_the_learner_is_waited_for(parts: Any) -> None:
    assert parts[3] == ["engine started", "engine sleep", "learner started"]


def test_an_engine_that_fails_ends_the_wait_for_a_learner_that_loads_beside_it() -> None:
    log: list[str] = []
    engine, learner, turns = Part(log, "engine"), Part(log, "learner"), Turns(shared=False)
    turns.engine_starts(engine)
    engine.broken = True
    with pytest.raises(EngineError, match="no memory"):
        turns.learner_starts(learner)
    assert log == []
    engine.broken = False
    turns.learner_starts(learner)
    assert log == ["engine looked at", "learner started", "engine started"]


def test_nobody_works_during_a_push_but_the_push(parts: Any) -> None:
    turns, _, _, log = parts
    with pytest.raises(ClusterError, match="both cannot have the next turn"):
        turns.need("both")  # a push announces itself
    turns.move("both")
    log.clear()
    for turn in ("engine", "learner"):
        with pytest.raises(ClusterError, match=f"the {turn} cannot have the next turn: now it is 'both'"):
            turns.need(turn)
    turns.need("both")
    assert log == []


def test_an_engine_that_has_the_gpu_cannot_be_pushed_to(parts: Any) -> None:
    turns, _, _, log = parts
    turns.need("engine")
    log.clear()
    with pytest.raises(ClusterError):
        turns.move("both")
    assert (log, turns.turn) == ([], "engine")


def test_before_the_start_nobody_has_a_turn() -> None:
    for turn in ("engine", "learner", "both"):
        with pytest.raises(ClusterError, match="'starting'"):
            Turns(shared=False).need(turn)


def test_a_push_that_failed_can_be_done_again(parts: Any) -> None:
    turns, _, _, log = parts
    turns.move("both")
    log.clear()
    turns.move("learner")
    turns.move("both")
    assert log == ["engine sleep", "learner reload", "learner offload optimizer", "engine wake weights"]


def test_after_a_change_that_failed_nothing_goes_on(parts: Any) -> None:
    turns, engine, _, log = parts
    engine.broken = True
    with pytest.raises(EngineError, match=r"'engine wakes: all' failed: no memory") as error:
        turns.need("engine")
    assert "engine.gpu_memory_utilization" in error.value.fix
    log.clear()
    for turn in ("engine", "learner"):
        with pytest.raises(ClusterError, match="onlinerl resume"):
            turns.need(turn)
    assert log == []


# --- `auto`, on a cluster that has no GPU ---


@pytest.mark.parametrize(
    ("keys", "field", "cause"),
    [
        ({"cluster.colocate": True}, "cluster.colocate", "the cluster has none"),
        ({"sync.backend": "nccl"}, "sync.backend", "the run is on CPUs"),
    ],
)
def test_a_cluster_without_gpus_is_refused_before_anything_starts(
    run: Run, keys: dict[str, Any], field: str, cause: str
) -> None:
    with pytest.raises(ConfigError, match=cause) as error:
        run(shared=False, **{"cluster.device": "auto", **keys})
    assert error.value.field == field
