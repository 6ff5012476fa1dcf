"""What an iterate answers to the held-out prompts."""

from __future__ import annotations

from typing import Any

from onlinerl.controller import collect
from onlinerl.controller.iteration import Iteration
from onlinerl.stores.rows import EVALUATION
from onlinerl.types import Request, Sampling, derive_seed


def answer(it: Iteration) -> dict[str, Any]:
    """One response to each, with the same seeds for every iterate."""
    config = it.parts.config
    # Divergences need temperature 1 and the whole vocabulary.
    sampling = Sampling(max_new_tokens=config.sampling.max_new_tokens)
    requests = [Request(prompt=p, seeds=(derive_seed(config.seed, "evaluation", p.id),)) for p in it.parts.heldout]
    groups = collect.generate(it, requests, sampling, EVALUATION, "answer")
    rollouts = [r for g in groups for r in g.rollouts]
    return {"samples": len(rollouts), "tokens": sum(len(r.token_ids) for r in rollouts)}
