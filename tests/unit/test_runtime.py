"""What Ray may raise or never answer becomes an error of ours, without a cluster."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from onlinerl import config as configuration
from onlinerl.errors import ClusterError, ConfigError, EngineError, LearnerError

runtime = pytest.importorskip("onlinerl.cluster.runtime")
exceptions = pytest.importorskip("ray.exceptions")

RAISED = [
    exceptions.GetTimeoutError("Get timed out"),
    exceptions.ObjectLostError("ab" * 28, None, ""),
    exceptions.OutOfMemoryError("Task was killed due to the node running low on memory"),
    exceptions.WorkerCrashedError(),
    exceptions.RaySystemError("System error: broken pipe"),
    exceptions.TaskCancelledError(),
    exceptions.RuntimeEnvSetupError("no such package"),
    exceptions.NodeDiedError("node died"),
]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
def test_every_exception_of_ray_is_said_in_our_words(monkeypatch, raised):
    def fail(ref):
        raise raised

    monkeypatch.setattr(runtime.ray, "wait", lambda refs, timeout: (refs[:1], refs[1:]))
    monkeypatch.setattr(runtime.ray, "get", fail)
    with pytest.raises(EngineError, match="replica 1: generating") as caught:
        runtime.get({"replica 1": "ref"}, timeout_s=1, error=EngineError, what="generating")
    assert caught.value.__cause__ is raised
    assert caught.value.fix


def cluster(**settings):
    base = {"name": "r", "model": "org/m", "iterations": 1, "algorithm": {"name": "dpo"}, "oracle": {"name": "sentiment"}}
    config = configuration.parse({**base, "prompts": {"train": "a", "heldout": "b"}, "cluster": settings})
    return runtime.Cluster(config)


@pytest.mark.parametrize(
    "raised", [*RAISED, ValueError("bad address"), ConnectionError("refused")], ids=lambda e: type(e).__name__
)
def test_a_cluster_that_cannot_be_reached(monkeypatch, raised):
    def fail(**_):
        raise raised

    monkeypatch.setattr(runtime.ray, "init", fail)
    with pytest.raises(ClusterError, match=r"cannot reach or start a Ray cluster at 10\.0\.0\.1:6379") as caught:
        cluster(address="10.0.0.1:6379").__enter__()
    assert caught.value.field == "cluster.address"


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_cluster_that_never_answers(monkeypatch, address):
    """Ray swallows every Exception while it tries to connect."""

    def init(**_):
        for _ in range(100):
            try:
                time.sleep(0.2)
            except Exception:  # noqa: BLE001  as Ray does it
                continue

    before = signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(runtime.ray, "init", init)
    with pytest.raises(ClusterError, match=r"did not answer within 0\.5 s") as caught:
        cluster(address=address, start_timeout_s=0.5).__enter__()
    assert caught.value.field == "cluster.start_timeout_s"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_sigterm_while_ray_starts_ends_it_like_one_at_any_other_time(monkeypatch):
    """Ray has a handler of its own then, which raises SystemExit."""
    ended = []

    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runtime.ray, "init", init)
    monkeypatch.setattr(runtime.ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(KeyboardInterrupt):
        cluster().__enter__()
    assert signal.getsignal(signal.SIGTERM) is before
    assert ended


def test_a_cluster_that_fails_while_room_is_reserved(monkeypatch):
    def fail():
        raise exceptions.RaySystemError("the head is gone")

    context = SimpleNamespace(address_info={"session_dir": "/tmp/ray/session_1"})
    monkeypatch.setattr(runtime.ray, "init", lambda **_: context)
    monkeypatch.setattr(runtime.ray, "shutdown", lambda: None)
    monkeypatch.setattr(runtime.ray, "cluster_resources", fail)
    asked = cluster(address="10.0.0.1:6379")
    with pytest.raises(ClusterError, match="Ray failed while room was reserved: RaySystemError"):
        asked.__enter__()
    assert asked.logs == "/tmp/ray/session_1/logs"


def test_a_rank_that_wrote_nothing_makes_no_checkpoint(tmp_path):
    group_module = pytest.importorskip("onlinerl.cluster.group")
    group = group_module.LearnerGroup.__new__(group_module.LearnerGroup)
    group.names = ["learner rank 0", "learner rank 1"]
    group.call = lambda method, path: [{"state/a.pt": 3, "rng_0.json": 1}, {"rng_1.json": 1}]
    assert group.save(tmp_path) == {"state/a.pt": 3, "rng_0.json": 1, "rng_1.json": 1}
    group.call = lambda method, path: [{"state/a.pt": 3}, {}]
    with pytest.raises(LearnerError, match="learner rank 1 wrote nothing"):
        group.save(tmp_path)


def test_what_fails_meanwhile_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(runtime, "LOOK_S", 0.01)
    monkeypatch.setattr(runtime.ray, "wait", lambda refs, timeout: (time.sleep(timeout), ([], refs))[1])
    looks = []

    def meanwhile():
        looks.append(1)
        if len(looks) == 3:
            raise EngineError("replica 0: no such model", fix="none")

    with pytest.raises(EngineError, match="no such model"):
        runtime.get({"rank 0": "ref"}, timeout_s=60, error=LearnerError, what="starting", meanwhile=meanwhile)
    with pytest.raises(LearnerError, match="did not finish within 0 s"):
        runtime.get({"rank 0": "ref"}, timeout_s=0.05, error=LearnerError, what="starting", meanwhile=lambda: None)


def test_a_replica_that_has_failed_to_start_is_said_while_others_load():
    kind = pytest.importorskip("onlinerl.cluster.pool").EnginePool
    pool = kind.__new__(kind)
    loading, failed = Future(), Future()
    pool._started = {"replica 0": loading, "replica 1": failed}
    pool.require_starting()
    failed.set_exception(exceptions.RayTaskError("start", "traceback", EngineError("no such model", fix="give another")))
    with pytest.raises(EngineError, match="replica 1: no such model") as caught:
        pool.require_starting()
    assert caught.value.fix == "give another"


class TwoArguments(Exception):
    """Cannot be unpickled: it is made again of its message alone."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


class Locked(Exception):
    """Cannot be pickled."""

    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


@pytest.mark.parametrize("raised", [TwoArguments("kv cache", "too small"), Locked("kv cache: too small")])
def test_an_engine_s_own_error_at_its_start_reaches_the_controller(raised, capfd):
    replica = pytest.importorskip("onlinerl.cluster.replica")

    class Engine:
        async def replica(self, *arguments):
            raise raised

    with pytest.raises((pickle.PicklingError, TypeError)):
        pickle.loads(pickle.dumps(raised))
    with pytest.raises(EngineError) as caught:
        asyncio.run(replica.loaded("model", Engine(), None, 0, ()))
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert f"{type(raised).__name__}: kv cache: too small" in arrived.cause
    assert "Traceback" in capfd.readouterr().err, "the logs have the rest"


def test_an_error_of_ours_at_a_replica_s_start_stays_as_it_is():
    replica = pytest.importorskip("onlinerl.cluster.replica")
    error = ConfigError("too small", field="engine.kv_cache_gib", fix="raise it")

    class Engine:
        async def replica(self, *arguments):
            raise error

    with pytest.raises(ConfigError) as caught:
        asyncio.run(replica.loaded("model", Engine(), None, 0, ()))
    assert caught.value is error
