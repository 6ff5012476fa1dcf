"""One rank of a real learner that lays sequences one after the other in a row, as a plain process.

python packed_process.py JOB RANK WORLD_SIZE PORT
"""

from __future__ import annotations

import pickle
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rank_process import Ranks, scored, with_arrays

from onlinerl.learners._rank import Rank
from onlinerl.learners._self_test import combine
from onlinerl.ops.batching import plan_step


def learner(ranks: Ranks, job: dict[str, Any], algorithm: Any) -> Rank:
    keys = {"padding_free": True, "attn_implementation": job["attention"], "gradient_checkpointing": job["recompute"]}
    made = ranks.learner(job["model"], algorithm, stage=job["stage"], dtype="float32", learner=keys)
    made.temperature = job["temperature"]
    return made


def work(ranks: Ranks, job: dict[str, Any]) -> dict[str, Any]:
    """Gradients of each loss cut up in two ways, log-probs and values, a self-test, and the logs of an optimizer step."""
    found: dict[str, Any] = {"gradients": {}}
    policy = learner(ranks, job, job["losses"]["dpo"]["algorithm"])
    critic = learner(ranks, job, job["critic"]["algorithm"])
    for name, loss in [*job["losses"].items(), ("critic", job["critic"])]:
        one = critic if name == "critic" else policy
        one.algorithm, one.needs = loss["algorithm"], loss["algorithm"].needs
        one.set_reference(job["reference"])
        count = sum(item.count(one.algorithm.unit) for item in loss["items"])
        for budget in job["budgets"]:
            micro = plan_step(loss["items"], ranks.world_size, budget, padding_free=True)[ranks.rank]
            found["gradients"][name, budget] = (len(micro), one.gradients(micro, count))
    items = job["losses"]["dpo"]["items"]
    found["reference"] = scored(policy, items, job["reference"], 1.0)
    found["policy"] = scored(policy, items, "policy", 1.0)
    ranks.step(critic, job["critic"]["items"])
    (found["values"],) = critic.values([[s for item in items for s in item.sequences]])
    found["critic"] = {n: p for n, p in whole(critic).items() if n.startswith(("critic.", "value_head."))}

    policy.algorithm, policy.needs = job["losses"]["dpo"]["algorithm"], job["losses"]["dpo"]["algorithm"].needs
    own = scored(policy, items, "policy", policy.temperature)
    annotated = with_arrays(items, reference_logprobs=own, anchor_logprobs=own, old_logprobs=own)
    micro = plan_step(annotated, ranks.world_size, 10_000, padding_free=True)[ranks.rank]
    found["self-test"] = combine(policy.self_test(micro, job["model"]), annotated, policy.algorithm)
    return found


def whole(one: Rank) -> dict[str, Any]:
    """Parameters as they are when they are in one piece. Collective."""
    found = {}
    for name, parameter in one._policy.named_parameters():
        with gathered(parameter) if hasattr(parameter, "ds_id") else nullcontext():
            found[name] = parameter.detach().float().numpy().copy()
    return found


def gathered(parameter: torch.nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)


def main(job_file: str, rank: str, world_size: str, port: str) -> None:
    job = pickle.loads(Path(job_file).read_bytes())
    torch.set_num_threads(1)
    ranks = Ranks(int(rank), int(world_size), int(port))
    for number, case in enumerate(job["cases"]):
        try:
            result: Any = work(ranks, job | case)
        except Exception:  # noqa: BLE001  the test reports it
            result = traceback.format_exc()
        if ranks.rank == 0 or isinstance(result, str):
            Path(f"{job_file}.{number}.{rank}").write_bytes(pickle.dumps(result))
        if isinstance(result, str):
            break  # the other ranks may wait for this one


if __name__ == "__main__":
    main(*sys.argv[1:])
