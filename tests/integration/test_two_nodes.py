"""The loop on two separately started Ray nodes of this machine: the learner on one, the replica on the other."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"


def write_config(folder: Path, model: Path, **changes: object) -> Path:
    """A small run of the real parts with an oracle that tells any two texts apart: a model of random weights says little else."""
    code = (
        "import zlib\n\n\ndef judge(groups):\n    return [[zlib.crc32(r.encode()) for r in g['responses']] for g in groups]\n"
    )
    (folder / "separates.py").write_text(code)
    openings = [
        {"text": f"the film was {word} and the story"}
        for word in ["old", "new", "long", "short", "slow", "fast", "dark", "light"]
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, openings)))
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps({"text": f"the music {w} the camera"}) for w in ("of", "and")))
    config = {
        "name": "run",
        "runs": str(folder / "runs"),
        "model": str(model),
        "iterations": 1,
        "algorithm": {"name": "dpo"},
        "oracle": {"name": "python", "function": "separates.judge"},
        "prompts": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "per_iteration": 4},
        "sampling": {"samples_per_prompt": 4, "max_new_tokens": 8},
        "training": {"batch_size": 2, "learning_rate": 1e-3},
        "engine": {"kv_cache_gib": 0.1, "dtype": "float32", "max_num_seqs": 8, "threads": 1},
        "learner": {"dtype": "float32", "threads": 1},
        "cluster": {"device": "cpu"},
        "metrics": {"prometheus": False},
        "checkpoints": {"min_free_gib": 0},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_learner_on_one_node_and_replica_on_the_other(tiny_llama, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    scratch = tempfile.mkdtemp(prefix="orl")  # short: Ray's sockets live here
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CPUS": "1",
        "OBJECT_STORE_MIB": "128",
        "ADDRESS": address,
        "NODE_IP": "127.0.0.1",
        "PORT": str(port),
        "TEMP_DIR": scratch,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    config = write_config(
        tmp_path,
        tiny_llama,
        cluster={"device": "cpu", "address": address},
        learner={"dtype": "float32", "threads": 1, "resources": {"learner_node": 1}},
        engine={"kv_cache_gib": 0.1, "dtype": "float32", "max_num_seqs": 8, "resources": {"rollout_node": 1}},
    )
    # Each node has one core of this machine, and the controller has all: a replica must take those of its own node.
    cores = sorted(os.sched_getaffinity(0))
    head, worker = cores[0], cores[-1]
    nodes: list[subprocess.Popen] = []
    try:
        with (Path(scratch) / "log").open("w") as log:
            for script, resource, core in (("head.sh", "learner_node", head), ("worker.sh", "rollout_node", worker)):
                own = env | {"RESOURCES": json.dumps({resource: 1})}
                command = ["taskset", "--cpu-list", str(core), "bash", str(LAUNCHERS / "ray" / script)]
                nodes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True))
        wait = [sys.executable, str(LAUNCHERS / "ray" / "wait_for_nodes.py"), address, "2", "120"]
        subprocess.run(wait, env=env, check=True, capture_output=True)
        # The launchers' own entry: run the first time.
        command = ["bash", str(LAUNCHERS / "run_or_resume.sh")]
        own = env | {
            "CONFIG": str(config),
            "RUN": str(tmp_path / "runs" / "run"),
            "ADDRESS": address,
            "VLLM_LOGGING_LEVEL": "INFO",
        }
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        logs = "".join(path.read_text(errors="replace") for path in Path(scratch).glob("session_2*/logs/worker-*"))
        assert set(re.findall(r"local_rank=0, core ids=(.*)", logs)) == {f"[{worker}]"}
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)
    phases = json.loads((tmp_path / "runs" / "run" / "iterations" / "0001" / "manifest.json").read_text())["phases"]
    assert phases["sync"]["proved"] is True
    assert phases["sync"]["backend"] == "gloo"
    assert phases["commit"]["status"] == "promoted"


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(600)
def test_without_learning_the_replica_never_changes(tiny_llama, tmp_path, monkeypatch):
    """Three iterations at learning rate 0 leave every parameter of the engine bit-identical, in both of its workers."""
    from rich.console import Console

    from onlinerl import app
    from onlinerl import config as configuration
    from onlinerl.cluster import sync
    from onlinerl.engines.vllm import VLLMReplica

    monkeypatch.syspath_prepend(tmp_path)
    cores = os.sched_getaffinity(0)
    held: list[list[dict[str, str]]] = []
    push = sync.WeightPush.push

    def push_and_look(self, version, model="policy"):
        report = push(self, version, model)
        [replica] = self._fleet.replicas
        held.append(replica.call(VLLMReplica.held).result(60))
        return report

    monkeypatch.setattr(sync.WeightPush, "push", push_and_look)
    path = write_config(
        tmp_path,
        tiny_llama,
        iterations=3,
        prompts={"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl"), "per_iteration": 2},
        training={"batch_size": 2, "learning_rate": 0.0},
        engine={"kv_cache_gib": 0.1, "dtype": "float32", "max_num_seqs": 8, "tensor_parallel_size": min(2, len(cores))},
    )
    assert app.run(configuration.load(path), Console(quiet=True)) == 4
    assert len(held) == 4
    assert len(held[0]) == min(2, len(cores))
    assert all(len(worker) > 10 for worker in held[0])
    assert held[1:] == held[:1] * 3
