import subprocess
import sys

import pytest
from rich.console import Console

from onlinerl import doctor, releases
from onlinerl.doctor import Part


@pytest.mark.parametrize(
    ("version", "bad"),
    [("0.17.5", False), ("0.17.6", True), ("0.18.2", True), ("0.19.3", True), ("0.19.3+cpu", True), ("0.19.8", False)],
)
def test_deepspeed_releases_with_wrong_gradients(version, bad):
    fault = releases.deepspeed_fault(releases.release(version))
    assert bool(fault) == bad


@pytest.mark.parametrize(
    ("version", "bad"), [("0.32.0", False), ("0.32.9", False), ("0.31.2", True), ("0.33.0", True), ("1.0", True)]
)
def test_vllm_series(version, bad):
    assert bool(doctor._not_of("vllm", 0, 32)(releases.release(version))) == bad


def test_a_missing_package_says_how_to_get_it():
    part = doctor._package("no-such-package", lambda version: None)
    assert (part.verdict, part.version) == ("missing", None)
    assert "make install" in part.detail


def test_a_part_that_crashes_is_a_verdict(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0")
    raised = doctor._package("x", lambda version: None, module="no_such_module_xyz")
    assert raised.verdict == "broken"
    assert "no_such_module_xyz" in raised.detail
    killed = doctor._package("x", lambda version: None, module="os; os.kill(os.getpid(), 11)")
    assert killed.verdict == "broken"
    assert "signal 11" in killed.detail


def test_a_part_that_hangs_is_a_verdict():
    fault, _ = doctor._run_python("import time; time.sleep(60)", timeout=0.5)
    assert "did not finish" in fault


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("echo no controller >&2; exit 3", "ended with exit code 3: no controller"),
        ("exec sleep 5", "did not finish within 0.5 s"),
    ],
)
def test_a_program_that_fails_is_a_verdict(monkeypatch, tmp_path, script, fault):
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(doctor, "PROGRAM_SECONDS", 0.5)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    part = doctor._program("sbatch", "--version", "submits")
    assert (part.verdict, part.detail) == ("broken", f"`{program} --version` {fault}")


def test_both_builds_of_vllm_are_broken(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.32.0")
    part = doctor._vllm()
    assert part.verdict == "broken"
    assert "uninstall both" in part.detail


def test_render_and_healthy():
    fine = Part(name="a", version="1", verdict="ok", detail="yes")
    lacking = Part(name="b", version=None, verdict="missing", detail="get it", required=False)
    broken = Part(name="c", version="2", verdict="wrong version", detail="get 3")
    assert doctor.healthy([fine, lacking])
    assert not doctor.healthy([fine, lacking, broken])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.render([fine, lacking, broken]))
    text = console.export_text()
    assert "missing (optional)" in text
    assert "get 3" in text


def test_importing_doctor_loads_nothing_heavy():
    code = "import sys, onlinerl.doctor; print([m for m in ('torch', 'vllm', 'ray', 'deepspeed', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
