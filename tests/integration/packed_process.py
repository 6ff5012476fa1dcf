"""One rank of a real learner that lays sequences one after the other in a row; started as `rank_process.py` is.

python packed_process.py JOB RANK WORLD_SIZE PORT
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import rank_process
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


def packed(ranks: Ranks, job: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Gradients of each loss cut up in two ways, log-probs and values, a self-test, and the logs of an optimizer step."""
    found: dict[str, Any] = {"gradients": {}}
    job = job | case
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


rank_process.KINDS |= {"packed": packed}

if __name__ == "__main__":
    rank_process.main(*sys.argv[1:])
