"""The real job script under a real Slurm of one machine: to the end, side by side, requeued and resumed, and given up."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
SEARCH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs Slurm and munge (Debian: slurm-wlm munge); missing: {', '.join(MISSING)}"),
    pytest.mark.engine,
    pytest.mark.timeout(300),
]


class Slurm:
    """A cluster of one node that is this machine, with everything it keeps in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        self._jobs: list[str] = []
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}

    def start(self) -> None:
        """Start the daemons and wait for the node."""
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        key, pipe = self.folder / "munge" / "key", self.folder / "munge" / "socket"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=self.env, check=True)
        own = {"key-file": key, "socket": pipe} | {f"{n}-file": self.folder / "munge" / n for n in ("pid", "seed", "log")}
        self._daemon(["munged", "--foreground", "--force", *(f"--{option}={path}" for option, path in own.items())])
        _until(pipe.exists, "munged has no socket")
        (self.folder / "slurm.conf").write_text(self._configuration(pipe))
        self._daemon(["slurmctld", "-D"])
        self._daemon(["slurmd", "-D"])
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        _until(lambda: self._run(idle, check=False).strip() == "1", "the node is not idle")

    def _configuration(self, pipe: Path) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        # Requeued jobs wait until the credentials of their former life have expired: 5 s instead of two minutes.
        return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={pipe},cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=5
ReturnToService=2
FirstJobId={100_000 + os.getpid()}
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

    def _daemon(self, command: list[str]) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True))

    def _run(self, command: list[str], *, check: bool = True, **more: str) -> str:
        done = subprocess.run(command, env=self.env | more, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, **variables: object) -> str:
        """The real script, as the README says, with one node and one CPU; returns the job's number."""
        options = ["--parsable", "--nodes=1", "--oversubscribe", "--time=10", f"--output={self.folder}/job-%j.log"]
        given = {name: str(value) for name, value in variables.items()}
        given |= {"VENV": sys.prefix, "OBJECT_STORE_MIB": "80"}
        self._jobs.append(
            self._run(["sbatch", *options, str(ROOT / "launchers" / "slurm" / "onlinerl.sbatch")], **given).strip()
        )
        return self._jobs[-1]

    def signal(self, job: str, name: str) -> None:
        """As Slurm's own warning: to the batch script alone."""
        self._run(["scancel", "--batch", f"--signal={name}", job])

    def state(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(field.split("=", 1) for field in self._run(["scontrol", "show", "job", "-o", job]).split() if "=" in field)

    def wait_for(self, job: str, *states: str, seconds: float = 150) -> dict[str, str]:
        """Until a job is in one of these states."""
        _until(lambda: self.state(job)["JobState"] in states, f"job {job} is not {states}", seconds, lambda: self.log(job))
        return self.state(job)

    def log(self, job: str) -> str:
        """What the job printed."""
        path = self.folder / f"job-{job}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """What the daemons said last."""
        return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in self.folder.glob("*.log"))

    def stop(self) -> None:
        """End the jobs, then the daemons, by their numbers."""
        if len(self._daemons) == 3:
            self._run(["scancel", "--full", f"--user={getpass.getuser()}"], check=False)
            left = ["squeue", "--noheader", "--states=running,completing"]
            deadline = time.monotonic() + 30
            while self._run(left, check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for job in self._jobs:  # what the script leaves on a node for those who look for a cause
            shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
            (ROOT / f".onlinerl-{job}.failures").unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _until(
    true: Callable[[], bool], otherwise: str, seconds: float = 60, more: Callable[[], str] | None = None, pause: float = 0.3
) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds} s" + (f":\n{more()[-4000:]}" if more else "")
        time.sleep(pause)


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slm"))  # short, for its sockets
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


# Says when it is asked about what was sampled (not only tried), then waits for a file.
GATED = """
import pathlib, time

def judge(groups):
    here = pathlib.Path(__file__).parent
    if not groups[0]["responses"][0].startswith(" It was good") and not (here / "open").exists():
        (here / "asked").touch()
        while not (here / "open").exists():
            time.sleep(0.1)
    return [[float(len(response)) for response in group["responses"]] for group in groups]
"""

BROKEN = """
def judge(groups):
    return [[1.0, 0.0] if group["responses"][0].startswith(" It was good") else None for group in groups]
"""


def test_jobs(slurm, toy_config, tmp_path, monkeypatch):
    """Three jobs on one node at once: one runs to its end; one is warned, requeued and resumed; one fails until it is given up."""
    (tmp_path / "gated.py").write_text(GATED)
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setitem(slurm.env, "PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    plain = toy_config(tmp_path, {"iterations": 1}, file="plain.yaml")
    gated = toy_config(
        tmp_path, {"name": 123, "oracle.name": "python", "oracle.function": "gated.judge", "iterations": 1}, file="gated.yaml"
    )
    broken = toy_config(tmp_path, {"oracle.name": "python", "oracle.function": "broken.judge"}, file="broken.yaml")
    warned = slurm.submit(CONFIG=gated)
    done = slurm.submit(CONFIG=plain, RUN=tmp_path / "runs" / "2024")
    failing = slurm.submit(CONFIG=broken, RUN=tmp_path / "runs" / "failing", REQUEUES=1)

    _until((tmp_path / "asked").exists, "the oracle was not asked", 150, lambda: slurm.log(warned))
    slurm.signal(warned, "USR1")
    _until(lambda: slurm.state(warned).get("Restarts") == "1", "not requeued", 60, lambda: slurm.log(warned))
    assert "interrupted; continue with" in slurm.log(warned)
    (tmp_path / "open").touch()

    assert slurm.wait_for(done, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", slurm.log(done)
    assert slurm.wait_for(warned, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", slurm.log(warned)
    end = slurm.wait_for(failing, "COMPLETED", "FAILED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "1"), slurm.log(failing)
    assert "1 restarts in a row finished no phase" in slurm.log(failing)

    for name, attempts in (("2024", 0), ("123", 1)):
        manifest = json.loads((tmp_path / "runs" / name / "manifest.json").read_text())
        assert (manifest["status"], manifest.get("attempt", 0)) == ("finished", attempts)
    assert "time limit: " in slurm.log(warned)  # of ten minutes, as the script told the run
    assert not list(ROOT.glob(".onlinerl-*"))


def test_a_job_that_is_refused_is_not_tried_again(slurm, toy_config, tmp_path):
    config = toy_config(tmp_path, {"sampling.samples_per_prompt": 1})
    job = slurm.submit(CONFIG=config)
    end = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0"), slurm.log(job)
