"""What a mixture of policy and reference says to the prompts that the policy is going to be asked about."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import batched
from onlinerl.decoding import continuation
from onlinerl.errors import LearnerError
from onlinerl.types import Draw, Drawn, Group, Request, Rollout, SampleMixtureRecord, Sampling

AT_ONCE = 64
"""Prompts that the learner gets together, and whose responses are written together. With another number rows are padded otherwise, and
log-probs differ in their last digits: a run that is resumed would not be the same bit for bit."""


def sample_mixture(it: Iteration) -> SampleMixtureRecord:
    """The learner, which holds the policy and reads the reference, draws from both at once. A chunk that a kill has cut is drawn again whole.

    Raises:
        LearnerError: if it does not hold the policy that is going to be sampled, or says what cannot be.
    """
    if it.weights.learner != it.sampling_version:
        raise LearnerError(
            f"the learner holds version {it.weights.learner}, and iteration {it.number} is sampled from {it.sampling_version}",
            field="schedule",
            fix="this is a bug of the loop: report it",
        )
    config, table = it.parts.config, it.mixture_groups()
    places = [("mixture", i) for i in range(it.needs.mixture_samples)]
    requests = [it.request(prompt, places, source="mixture") for prompt in it.prompts()[0] if prompt.id not in it.reused]
    it.parts.tracker.phase_started(it.number, "sample_mixture", len(requests), "groups")
    for chunk in batched(requests, AT_ONCE):
        missing = set(table.missing([request.prompt.id for request in chunk]))
        if missing:
            groups = _groups(it, chunk, config.sampling.spec())
            table.append([group for group in groups if group.prompt.id in missing])
        it.parts.tracker.phase_advanced(it.number, "sample_mixture", len(chunk))
        it.check_stop()
    table.seal()
    made = [rollout for group in table for rollout in group.rollouts]
    return {
        "samples": len(made),
        "tokens": sum(len(rollout.token_ids) for rollout in made),
        "policy_version": it.sampling_version,
        "reference": it.reference(),
        "weight": it.needs.mixture_weight,
    }


def _groups(it: Iteration, chunk: Sequence[Request], sampling: Sampling) -> list[Group]:
    tokenizer, asked = it.parts.tokenizer, [(r, seed, how) for r in chunk for seed, how, _ in r.responses(sampling)]
    draws = [Draw(prompt_ids=(*request.prompt.token_ids, *request.prefix_ids), seed=seed) for request, seed, _ in asked]
    end = tokenizer.eos_token_id
    drawn = it.parts.learner.sample_mixture(
        draws,
        sampling,
        reference=it.reference_model() or "policy",
        weight=it.needs.mixture_weight,
        ends=[] if end is None else [end],
    )
    made: dict[str, list[Rollout]] = {request.prompt.id: [] for request in chunk}
    for (request, seed, how), one in zip(asked, drawn, strict=True):
        _require_possible(request, one, how)
        made[request.prompt.id].append(
            Rollout(
                token_ids=one.token_ids,
                logprobs=one.logprobs,
                text=continuation(tokenizer, request.prompt.token_ids, (*request.prefix_ids, *one.token_ids)),
                finish_reason="stop" if one.ended else "length",
                policy_version=it.sampling_version,
                sampler=how,
                seed=seed,
                source="mixture",
                prefix_ids=request.prefix_ids,
            )
        )
    return [Group(prompt=request.prompt, rollouts=tuple(made[request.prompt.id])) for request in chunk]


def _require_possible(request: Request, one: Drawn, how: Sampling) -> None:
    if 0 < len(one.token_ids) == len(one.logprobs) <= how.max_new_tokens and all(map(math.isfinite, one.logprobs)):
        return
    raise LearnerError(
        f"the learner's response to prompt {request.prompt.id} has {len(one.token_ids)} tokens, of at most {how.max_new_tokens}, with "
        f"{len(one.logprobs)} log-probs, or one that is not finite",
        field="learner.dtype",
        fix="try learner.dtype=float32 in a new run; a learner of your own gives one finite log-prob per token",
    )
