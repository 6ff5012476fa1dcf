"""What the base model says to the prompts that the policy is going to be asked about."""

from __future__ import annotations

from collections import Counter

from onlinerl.controller import collect
from onlinerl.controller.iteration import Iteration
from onlinerl.types import SampleReferenceRecord


def sample_reference(it: Iteration) -> SampleReferenceRecord:
    """Push the base model into the engine, sample from it, and push the policy back; both pushes are proved.

    Nothing is pushed where the policy is still the base model, or where everything was sampled before a kill: a resume begins with the
    policy in the engine.
    """
    config, table = it.parts.config, it.reference_groups()
    places = [("reference", i) for i in range(it.needs.reference_samples)]
    requests = [it.request(prompt, places, source="reference") for prompt in it.prompts()[0] if prompt.id not in it.reused]
    pushes = it.sampling_version > 0 and not table.sealed
    if pushes:
        it.push_base()
    sampled = collect.generate(it, requests, config.sampling.spec(), table, "sample_reference", version=0)
    if pushes:
        it.push()
    return {
        "samples": sum(s.responses for s in sampled),
        "tokens": sum(s.tokens for s in sampled),
        "rejected": dict(Counter(reason for s in sampled for reason in s.rejected)),
        "policy_version": 0,
        "pushes": 2 * pushes,
    }
