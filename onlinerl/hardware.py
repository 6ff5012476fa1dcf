"""What this machine computes with, found out without loading a library for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of CPUs that have instructions for it: x86 with AVX-512 or AMX, and ARM."""


def has_gpu() -> bool:
    """A machine without a GPU's device files has no GPU, whatever a driver says."""
    return any(True for pattern in ("nvidia[0-9]*", "kfd") for _ in Path("/dev").glob(pattern))


def memory(meminfo: str | None = None, cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[float, float] | None:
    """Total and available memory in bytes, of this machine or of the container that this process is in, whichever is less; None where the
    system does not say.

    Args:
        meminfo: the contents of /proc/meminfo, if not this machine's.
        cgroup: where the limits of the container stand.
    """
    if meminfo is None:
        file = Path("/proc/meminfo")
        meminfo = file.read_text() if file.exists() else ""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, flags=re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= kib.keys():
        return None
    total, available = int(kib["MemTotal"]) * 1024.0, int(kib["MemAvailable"]) * 1024.0
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or `max`
        return total, available
    return min(total, limit), min(available, limit - used)


def computes_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether this machine's CPU multiplies matrices in bfloat16 with instructions of its own. Without them torch does it one number at a
    time, which is about a hundred times slower than float32.

    Args:
        cpuinfo: the contents of /proc/cpuinfo, if not this machine's.
    """
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text() if file.exists() else ""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, flags=re.MULTILINE)
    return bool(lines) and all(BFLOAT16 & set(line.split()) for line in lines)


def keeping_memory() -> dict[str, str]:
    """Environment variables of a process that computes on CPU, with which glibc keeps the memory that is freed. Left to itself it gives each array
    of more than 32 MiB back and asks for the next one, whose pages the kernel clears: a tenth of a forward pass. None where the environment of
    this process says one of them already.
    """
    # No array has a mapping of its own, and of the end of the heap 1 GiB may be free before it goes back.
    variables = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    return {} if variables.keys() & os.environ.keys() else variables
