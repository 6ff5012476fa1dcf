"""Fresh prompts, K responses each."""

from __future__ import annotations

from collections import Counter
from typing import Any

from onlinerl.controller import collect
from onlinerl.controller.iteration import Iteration
from onlinerl.stores.rows import ROLLOUTS
from onlinerl.types import Request, derive_seed


def sample(it: Iteration) -> dict[str, Any]:
    """Sample from the iterate before this one, or from the one before that (`schedule.max_lag`)."""
    config = it.parts.config
    prompts, next_cursor = it.prompts()
    k = config.sampling.samples_per_prompt
    requests = [Request(prompt=p, seeds=tuple(derive_seed(config.seed, it.number, p.id, i) for i in range(k))) for p in prompts]
    groups = collect.generate(it, requests, config.sampling.spec(), ROLLOUTS, "sample", feed=it.rollouts)
    rollouts = [r for g in groups for r in g.rollouts]
    tokens = sum(len(r.token_ids) for r in rollouts)
    it.report.sampled(it.number, groups)
    return {
        "samples": len(rollouts),
        "tokens": tokens,
        "prompts": len(groups),
        "truncated": sum(r.finish_reason == "length" for r in rollouts),
        "rejected": dict(Counter(reason for g in groups for reason in g.rejected)),
        "next_cursor": next_cursor,
        "policy_version": it.sampling_version,
    }
