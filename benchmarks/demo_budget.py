"""Wall time and peak memory of a command and everything it starts, e.g. of the demo.

    python benchmarks/demo_budget.py make demo        (a Python with psutil, outside .venv if .venv is to be made by the command)

Memory is the proportional set size summed over all descendants (shared pages are counted once). The kernel walks it page by page, which
took 16 % of a core when it was asked every second; now it is asked every few seconds, for at most 3 % of a core, and a peak that is shorter
may be missed. Processes that leave the family are found again through their session, so Ray's daemons count too.
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

GIB = 2**30
SHARE = 0.03
"""Of a core's time that may go into looking."""


def family(root: psutil.Process, known: dict[int, psutil.Process]) -> list[psutil.Process]:
    """All living descendants of `root`, also those whose parent has died since they were first seen."""
    seeds = [root, *known.values()]
    for seed in seeds:
        try:
            for process in [seed, *seed.children(recursive=True)]:
                known[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    for pid in [pid for pid, process in known.items() if not process.is_running()]:
        del known[pid]
    return list(known.values())


def memory(processes: list[psutil.Process]) -> int:
    """Bytes, shared pages counted once."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def main() -> int:
    """Run the command given as arguments; print its time and peak memory."""
    started = time.monotonic()
    child = subprocess.Popen(sys.argv[1:])
    root, known, peak = psutil.Process(child.pid), {}, 0
    while child.poll() is None:
        before = time.process_time()
        peak = max(peak, memory(family(root, known)))
        time.sleep(max(1.0, (time.process_time() - before) / SHARE))
    seconds = time.monotonic() - started
    print(f"{' '.join(sys.argv[1:])}: exit {child.returncode}, {seconds / 60:.1f} minutes, peak memory {peak / GIB:.1f} GiB")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
