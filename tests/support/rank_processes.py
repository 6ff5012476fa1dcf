"""Ranks of a real learner, as plain processes that meet over a store of this one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

LONGEST_S = 600
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(script: Path, ranks: int, job: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Start the ranks and wait until they have ended.

    Args:
        script: like `rank_process.py`.
        ranks: how many.
        job: what they are to do; one answer for each of `job["cases"]`.
        folder: for the job, the answers and the logs.

    Returns:
        Of each case what rank 0 has written, or `{"error": ...}`: of a rank that failed, or the end of the logs if none got that far.
    """
    file = folder / "job"
    file.write_bytes(pickle.dumps(job))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=120), wait_for_workers=False)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(script), str(file), str(rank), str(ranks), str(store.port)]
        with log.open("w") as out:
            processes.append(subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out, cwd=folder))
    try:
        for process in processes:
            process.wait(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    nothing = {"error": "the ranks did not get this far:\n" + "\n".join(log.read_text()[-3000:] for log in logs)}
    found = []
    for case in range(len(job["cases"])):
        said = [(rank, answer) for rank in range(ranks) if (answer := Path(f"{file}.{case}.{rank}")).exists()]
        answers = [(rank, pickle.loads(answer.read_bytes())) for rank, answer in said]
        failed = [{"error": f"rank {rank}: {answer['error']}"} for rank, answer in answers if "error" in answer]
        found.append(next(iter(failed or [answer for _, answer in answers]), nothing))
    return found
