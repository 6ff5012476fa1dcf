"""Launchers: the scripts are sound, and head.sh plus worker.sh really make a cluster."""

from __future__ import annotations

import json
import os
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
SCRIPTS = sorted([*LAUNCHERS.rglob("*.sh"), *LAUNCHERS.rglob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCHERS)))
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_every_platform_has_notes():
    for platform in ("ray", "slurm", "kubernetes"):
        assert (LAUNCHERS / platform / "README.md").is_file()


def test_kubernetes_rayjob():
    job = yaml.safe_load((LAUNCHERS / "kubernetes" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert "run_or_resume.sh" in spec["entrypoint"]
    assert "CONFIG" in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) >= 2
    offered = []
    for group in groups:
        container = group["template"]["spec"]["containers"][0]
        assert container["image"] == groups[0]["template"]["spec"]["containers"][0]["image"]
        assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/shared", "/dev/shm"}
        # KubeRay pastes the value into a shell command: JSON in an extra pair of quotes.
        offered.append(set(json.loads(json.loads(group["rayStartParams"]["resources"].strip("'")))))
    assert offered == [{"learner_node"}, {"rollout_node"}]
    for worker in cluster["workerGroupSpecs"]:
        assert worker["groupName"]
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_sbatch_directives():
    lines = (LAUNCHERS / "slurm" / "onlinerl.sbatch").read_text().splitlines()
    directives = {line.split()[1].split("=")[0] for line in lines if line.startswith("#SBATCH")}
    assert directives >= {"--nodes", "--ntasks-per-node", "--signal", "--requeue", "--output", "--open-mode"}


@pytest.mark.parametrize("exists", [False, True])
def test_run_or_resume(tmp_path, exists):
    """The first start runs, every later one resumes, in the directory that was asked for."""
    onlinerl = tmp_path / "bin" / "onlinerl"
    onlinerl.parent.mkdir()
    onlinerl.write_text('#!/bin/sh\necho "$@"\n')
    onlinerl.chmod(0o755)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)  # a directory alone is no run yet
    if exists:
        (run / "manifest.json").write_text("{}")
    env = os.environ | {"PATH": f"{onlinerl.parent}:{os.environ['PATH']}", "CONFIG": "c.yaml", "RUN": str(run)}
    command = ["bash", str(LAUNCHERS / "run_or_resume.sh"), "iterations=2"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    if exists:
        assert said == f"resume --finished-ok {run} cluster.address=auto iterations=2"
    else:
        assert said == f"run c.yaml runs={run.parent} name=mine cluster.address=auto iterations=2"


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_head_and_worker_make_a_cluster():
    """Two Ray nodes on this machine, told apart by their resources; both are gone after SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # Own and short: Ray's sockets live here (Unix limits their path to 107 bytes), and other clusters of this machine do not.
    scratch = tempfile.mkdtemp(prefix="orl")
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CPUS": "1",
        "OBJECT_STORE_MIB": "80",
        "ADDRESS": address,
        "NODE_IP": "127.0.0.1",
        "PORT": str(port),
        "TEMP_DIR": scratch,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    nodes = []
    try:
        with (Path(scratch) / "log").open("w") as log:
            for script, resource in (("head.sh", "learner_node"), ("worker.sh", "rollout_node")):
                own = env | {"RESOURCES": json.dumps({resource: 1})}
                command = ["bash", str(LAUNCHERS / "ray" / script)]
                nodes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True))
        wait = [sys.executable, str(LAUNCHERS / "ray" / "wait_for_nodes.py"), address]
        done = subprocess.run([*wait, "2", "120"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + (Path(scratch) / "log").read_text()
        look = (
            "import json, sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR');"
            "print(json.dumps([n['Resources'] for n in ray.nodes() if n['Alive']]))"
        )
        said = subprocess.run([sys.executable, "-c", look, address], env=env, capture_output=True, text=True, check=True)
        resources = json.loads(said.stdout.splitlines()[-1])
        names = sorted(name for node in resources for name in node if name in ("learner_node", "rollout_node"))
        assert names == ["learner_node", "rollout_node"]
        assert all(node["CPU"] == 1 for node in resources)
        surplus = subprocess.run([*wait, "1", "5"], env=env, capture_output=True, text=True, check=False)
        assert surplus.returncode == 1
        assert "expected 1" in surplus.stderr
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        codes = [_end(node) for node in nodes]
        left = _using(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    assert None not in codes, "a node did not stop on SIGTERM"
    assert left == [], "processes outlived their node"


def _end(node: subprocess.Popen) -> int | None:
    try:
        return node.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(node.pid, signal.SIGKILL)
        return None


def _using(scratch: str) -> list[str]:
    """Command lines of processes that mention a directory."""
    lines = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if scratch in line and not line.startswith("ps ")]
