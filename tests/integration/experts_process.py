"""One rank of a real learner that keeps the routers of a mixture of experts in balance; started as `rank_process.py` is.

python experts_process.py JOB RANK WORLD_SIZE PORT
"""

from __future__ import annotations

import sys
from typing import Any

import rank_process
from rank_process import Ranks

from onlinerl.ops.batching import step_units


def experts(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The gradient of a step, and what it reports."""
    keys = {"gradient_checkpointing": case["recompute"]}
    one = ranks.learner(
        job["model"], job["algorithm"], stage=case["stage"], dtype="float32", learner=keys, aux_loss_coef=job["weight"]
    )
    micro = ranks.mine(job["items"], case["budget"])
    gradients = one.gradients(micro, step_units(job["items"], one.algorithm.unit))
    return {"gradients": gradients, "micro": len(micro)}


rank_process.KINDS |= {"experts": experts}

if __name__ == "__main__":
    rank_process.main(*sys.argv[1:])
