"""Launchers: the scripts are sound, and head.sh plus worker.sh really make a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
SCRIPTS = sorted([*LAUNCHERS.rglob("*.sh"), *LAUNCHERS.rglob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCHERS)))
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", ["ray/head.sh", "ray/worker.sh", "run_or_resume.sh"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_a_script_that_is_asked_for_help_starts_nothing(script, option, tmp_path):
    """Not even the secret of a cluster is made."""
    command = ["bash", str(LAUNCHERS / script), option]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=home).stdout
    assert "RAY_AUTH_TOKEN " in said
    assert "set -e" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["ray/wait_for_nodes.py", "slurm/free_ports.py"])
def test_a_script_without_its_arguments_says_how_it_is_called(script):
    done = subprocess.run([sys.executable, LAUNCHERS / script], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: {Path(script).name}")


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
    assert cluster["authOptions"] == {"mode": "token"}  # KubeRay makes a Secret and gives it to every pod
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


def test_jobs_with_neighbouring_numbers_have_ports_of_their_own():
    """Ray takes three ports for each head."""
    spec = importlib.util.spec_from_file_location("free_ports", LAUNCHERS / "slurm" / "free_ports.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    starts = [module.start(job) for job in range(7000, 7000 + module.JOBS)]
    assert len({port + i for port in starts for i in range(3)}) == 3 * module.JOBS
    assert 1024 < min(starts) < max(starts) + 2 < 32768


def test_a_job_whose_ports_are_taken_finds_others():
    ask = [sys.executable, str(LAUNCHERS / "slurm" / "free_ports.py"), "7000"]
    first = int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
    with socket.socket() as other:
        other.bind(("", first + 2))
        other.listen()
        second = int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
    assert not {first, first + 1, first + 2} & {second, second + 1, second + 2}


@pytest.mark.parametrize("name", ["mine", "123", "1e3", "it's"])
@pytest.mark.parametrize("exists", [False, True])
def test_run_or_resume(tmp_path, exists, name):
    """The first start runs, every later one resumes, in the directory that was asked for, whatever YAML would take it for."""
    onlinerl = tmp_path / "bin" / "onlinerl"
    onlinerl.parent.mkdir()
    onlinerl.write_text('#!/bin/sh\necho "$@"\n')
    onlinerl.chmod(0o755)
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)  # a directory alone is no run yet
    if exists:
        (run / "manifest.json").write_text("{}")
    env = os.environ | {
        "PATH": f"{onlinerl.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CONFIG": "c.yaml",
        "RUN": str(run),
    }
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}
    command = ["bash", str(LAUNCHERS / "run_or_resume.sh"), "iterations=2"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    if exists:
        assert said == f"resume --finished-ok {run} cluster.address=auto iterations=2"
    else:
        assert said == f'run c.yaml runs="{run.parent}" name="{name}" cluster.address=auto iterations=2'


def test_run_or_resume_refuses_what_onlinerl_would_refuse(tmp_path):
    """With its exit code, by which a scheduler knows that trying again is of no use, and without a traceback."""
    (tmp_path / "c.yaml").write_text("name: mine\nmodl: here\n")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CONFIG": str(tmp_path / "c.yaml")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}
    done = subprocess.run(["bash", str(LAUNCHERS / "run_or_resume.sh")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config: model: is missing")
    assert "\n  fix: " in done.stderr


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_head_and_worker_make_a_cluster(tmp_path):
    """Two Ray nodes on this machine, told apart by their resources; strangers are refused; both are gone after SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # Own and short: Ray's sockets live here (Unix limits their path to 107 bytes), and other clusters of this machine do not.
    scratch = tempfile.mkdtemp(prefix="orl")
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),  # where the secret of the cluster is made
        "CPUS": "1",
        "OBJECT_STORE_MIB": "80",
        "ADDRESS": address,
        "NODE_IP": "127.0.0.1",
        "PORT": str(port),
        "TEMP_DIR": scratch,
    }
    nodes = []
    try:
        with (Path(scratch) / "log").open("w") as log:
            for script, resource in (("head.sh", "learner_node"), ("worker.sh", "rollout_node")):
                own = env | {"RESOURCES": json.dumps({resource: 1})}
                command = ["bash", str(LAUNCHERS / "ray" / script)]
                nodes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True))
                _wait_for(tmp_path / ".ray" / "auth_token")
        assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
        wait = [sys.executable, str(LAUNCHERS / "ray" / "wait_for_nodes.py"), address]
        done = subprocess.run([*wait, "2", "120"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + (Path(scratch) / "log").read_text()
        look = (
            "import json, os, sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR');"
            "nice = ray.remote(lambda: os.nice(0));"
            "print(json.dumps([ray.get(nice.options(num_cpus=0, resources={name + '_node': 0.1}).remote()) "
            "for name in ('learner', 'rollout')]));"
            "print(json.dumps([n['Resources'] for n in ray.nodes() if n['Alive']]))"
        )
        look = [sys.executable, "-c", look, address]
        stranger = subprocess.Popen(look, env=env | {"RAY_AUTH_MODE": "disabled"}, stderr=subprocess.PIPE, text=True)
        said = subprocess.run(look, env=env | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True, check=True)
        niceness, resources = map(json.loads, said.stdout.splitlines()[-2:])
        assert niceness == [os.nice(0)] * 2, "workers of Ray come after nobody"
        names = sorted(name for node in resources for name in node if name in ("learner_node", "rollout_node"))
        assert names == ["learner_node", "rollout_node"]
        assert all(node["CPU"] == 1 for node in resources)
        _, complaint = stranger.communicate(timeout=60)
        assert stranger.returncode != 0
        assert "AuthenticationError" in complaint
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


# A cluster that a run starts for itself, and a stranger who found its port.
OWN_CLUSTER = """
import os, subprocess, sys, time
import psutil, ray
from onlinerl import config
from onlinerl.cluster.runtime import Cluster

with Cluster(config.load(sys.argv[1])):
    assert ray.get(ray.remote(lambda: os.nice(0)).options(num_cpus=0).remote()) == os.nice(0)
    raylet = next(each for each in psutil.Process().children() if each.name() == "raylet")
    assert os.getpgid(raylet.pid) != os.getpgrp(), "a SIGTERM to the group would reach it"
    below = [(each.name(), " ".join(each.cmdline())) for each in psutil.Process().children(recursive=True)]
    workers = [args for name, args in below if name != "raylet" and ("ray::IDLE" in args or "default_worker.py" in args)]
    assert len(workers) == 1, f"{workers}: more were started than were asked for"
    def start(file):
        print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, file=open(file, "w"), flush=True)  # as ninja starts compilers
        time.sleep(5)
        os.kill(os.getpid(), 9)

    try:
        ray.get(ray.remote(start).options(num_cpus=0, max_retries=0).remote(sys.argv[2]))
    except ray.exceptions.WorkerCrashedError:
        lingers = psutil.Process(int(open(sys.argv[2]).read()))
    address = ray.get_runtime_context().gcs_address
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    look = "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR')"
    stranger = subprocess.run([sys.executable, "-c", look, address], env=env, capture_output=True, text=True)
assert not lingers.is_running() or lingers.status() == psutil.STATUS_ZOMBIE, "what a part has started ends with the cluster"
assert stranger.returncode != 0 and "AuthenticationError" in stranger.stderr, stranger.stderr
"""


@pytest.mark.engine
def test_a_cluster_of_a_run_alone_refuses_strangers_and_leaves_no_secret_behind(toy_config, tmp_path):
    config = toy_config(tmp_path, {"cluster.device": "cpu"})
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLUSTER, config, tmp_path / "pid"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize("script", ["run_or_resume.sh", "ray/worker.sh"])
def test_without_a_secret_nobody_joins_a_cluster(script, tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "CONFIG": "c.yaml", "ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(["bash", str(LAUNCHERS / script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert not (tmp_path / ".ray").exists()


def test_two_heads_make_one_secret_and_a_readable_one_is_closed(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "TOKEN_MISSING": "make", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", f'source {LAUNCHERS}/ray/auth.sh; cat "$RAY_AUTH_TOKEN_PATH"']
    heads = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    told = {head.communicate()[0] for head in heads}
    assert len(told) == 1
    assert len(told.pop()) == 64
    (made,) = (tmp_path / ".ray").iterdir()
    made.chmod(0o644)
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert made.stat().st_mode & 0o777 == 0o600


def test_an_empty_secret_is_none(tmp_path):
    """As a full disk leaves behind: a cluster would start that everybody can join, or none."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "TOKEN_MISSING": "make"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").touch()
    command = ["bash", "-c", f"source {LAUNCHERS}/ray/auth.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"is empty: remove {tmp_path}/.ray/auth_token" in done.stderr


def _wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


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
