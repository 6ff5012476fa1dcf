"""What an iterate answers to the held-out prompts."""

from __future__ import annotations

from onlinerl.controller import collect
from onlinerl.controller.iteration import Iteration
from onlinerl.protocols.store import EVALUATION
from onlinerl.types import AnswerRecord, Request, Sampling, derive_seed


def answer(it: Iteration) -> AnswerRecord:
    """One response to each, with the same seeds for every iterate."""
    config = it.parts.config
    # Divergences need temperature 1 and the whole vocabulary.
    sampling = Sampling(max_new_tokens=config.sampling.max_new_tokens)
    requests = [Request(prompt=p, seeds=(derive_seed(config.seed, "evaluation", p.id),)) for p in it.parts.heldout]
    table = it.parts.store.groups(it.number, EVALUATION, {p.id: p for p in it.parts.heldout})
    sampled = collect.generate(it, requests, sampling, table, "answer", version=it.number)
    return {"samples": sum(s.responses for s in sampled), "tokens": sum(s.tokens for s in sampled)}
