"""What Ray may raise or never answer becomes an error of ours, without a cluster."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from onlinerl import config as configuration
from onlinerl.errors import ClusterError, EngineError, LearnerError

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
