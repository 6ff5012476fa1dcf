"""Whole small runs through the command line, with what needs GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SMALL = {
    "iterations": 2,
    "engine.name": "vllm",
    "learner.name": "deepspeed",
    "learner.dtype": "bfloat16",
    "engine.enforce_eager": True,
    "engine.max_num_seqs": 16,
    "engine.gpu_memory_utilization": 0.5,
    "engine.cpus": 0,
    "learner.cpus": 0,
    "training.learning_rate": 1.0e-4,
    "cluster.device": "cuda",
    "metrics.prometheus": False,
}

Run = Callable[..., dict[str, Any]]


def onlinerl(folder: Path, *arguments: object) -> str:
    """The command line in a process of its own; it inherits this one's session, so that a deadline ends it, too."""
    command = [sys.executable, "-m", "onlinerl.cli", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def assert_pushed(run: Path, record: Callable[[str, object], None], backend: str) -> dict[str, Any]:
    """Every iterate arrived by this transport, proved. Returns `show --json`."""
    report = json.loads(onlinerl(run.parent, "show", run, "--json"))
    rows = report["iterations"]
    assert all(row["status"] == "promoted" for row in rows)
    assert all(row["sync"]["proved"] for row in rows)
    from onlinerl.stores.directory import RunDirectory

    with RunDirectory.open(run) as store:
        syncs = [store.phases(row["iteration"])["sync"] for row in rows]
    assert {sync["backend"] for sync in syncs} == {backend}
    record("push_seconds", f"{syncs[-1]['seconds']:.2f}")
    record("canary_nats", f"{max(sync['canary_nats'] for sync in syncs):.4f}")
    return report


@pytest.fixture
def run(toy_config: Any, gpu_model: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> Run:
    """Runs two iterations of a small model; `backend`: what its weights must have travelled over."""

    def start(backend: str, **overrides: object) -> dict[str, Any]:
        config = toy_config(tmp_path, {**SMALL, "model": str(gpu_model), **overrides})
        onlinerl(tmp_path, "run", config)
        return assert_pushed(tmp_path / "runs" / "toy", record_property, backend)

    return start


@pytest.mark.gpus(1)
def test_engine_and_learner_on_one_gpu(run: Run) -> None:
    run("ipc", **{"cluster.colocate": True})


@pytest.mark.gpus(2)
def test_weights_travel_over_nccl(run: Run) -> None:
    run("nccl")


@pytest.mark.gpus(2)
def test_two_pairs_share_two_gpus(run: Run) -> None:
    run("ipc", **{"cluster.colocate": True, "engine.replicas": 2, "learner.ranks": 2, "learner.zero_stage": 3})


@pytest.mark.gpus(3)
def test_an_engine_across_two_gpus(run: Run) -> None:
    run("nccl", **{"engine.tensor_parallel_size": 2})


@pytest.mark.gpus(1)
def test_the_quickstart(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Its first two iterations; on one GPU, engine and learner share it."""
    import torch

    model = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not (model / "config.json").exists():
        pytest.skip("the quickstart's model is missing: python -m onlinerl.fetch")
    shared = torch.cuda.device_count() == 1
    overrides = [
        f"model={model}",
        f"runs={tmp_path / 'runs'}",
        "iterations=2",
        "cluster.device=cuda",
        f"cluster.colocate={str(shared).lower()}",
        "metrics.prometheus=false",
    ]
    onlinerl(tmp_path, "run", ROOT / "configs" / "quickstart.yaml", *overrides)

    report = assert_pushed(tmp_path / "runs" / "quickstart", record_property, "ipc" if shared else "nccl")
    rewards = [row["reward"] for row in report["iterations"]]
    record_property("rewards", " ".join(f"{reward:.2f}" for reward in rewards))
    assert rewards[-1] > rewards[0]
