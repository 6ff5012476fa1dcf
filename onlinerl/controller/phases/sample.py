"""Fresh prompts, K responses each, and the greedy one where the algorithm asks for it."""

from __future__ import annotations

from collections import Counter

from onlinerl.controller import collect
from onlinerl.controller.iteration import Iteration
from onlinerl.types import Request, SampleRecord, derive_seed


def sample(it: Iteration) -> SampleRecord:
    """Sample from the iterate before this one, or from the one before that (`schedule.max_lag`)."""
    config = it.parts.config
    prompts, next_cursor = it.prompts()
    k = config.sampling.samples_per_prompt
    greedy = it.needs.greedy
    places = [*range(k), *(["greedy"] if greedy else [])]
    requests = [
        Request(prompt=p, seeds=tuple(derive_seed(config.seed, it.number, p.id, i) for i in places), greedy=greedy)
        for p in prompts
    ]
    sampled = collect.generate(it, requests, config.sampling.spec(), it.groups(), "sample", feed=it.rollouts)
    it.report.sampled(it.number, sampled)
    return {
        "samples": sum(s.responses for s in sampled),
        "tokens": sum(s.tokens for s in sampled),
        "prompts": len(sampled),
        "truncated": sum(s.cut for s in sampled),
        "rejected": dict(Counter(reason for s in sampled for reason in s.rejected)),
        "next_cursor": next_cursor,
        "policy_version": it.sampling_version,
    }
