"""The prompts of the iteration, K responses each, and what the algorithm asks for beside them: the greedy one, those of the base model, of a mixture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from onlinerl.controller import collect
from onlinerl.controller.carried import with_carried
from onlinerl.controller.dynamic import Rounds
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.reuse import Reused
from onlinerl.controller.tally import Sampled
from onlinerl.errors import StoreError
from onlinerl.types import Group, Prompt, Request, Rollout, SampleRecord, derive_seed


def sample(it: Iteration) -> SampleRecord:
    """Sample from the iterate before this one, or from the one before that (`schedule.max_lag`); take what is reused from where it is."""
    config = it.parts.config
    k = config.sampling.samples_per_prompt
    greedy = it.needs.greedy
    places = [*range(k), *(["greedy"] if greedy else [])]
    rounds, reuse = Rounds(it), Reused(it)

    def requests(prompts: Sequence[Prompt]) -> list[Request]:
        return [it.request(prompt, places, greedy=greedy) for prompt in prompts if prompt.id not in it.reused]

    def more(sampled: Mapping[str, Sampled]) -> list[Request]:
        while it.dynamic and (prompts := rounds.more({**sampled, **reuse.taken})):
            it.rollouts.put(reuse.take(prompts))
            if asked := requests(prompts):
                return asked
        return []

    def with_others(groups: Sequence[Group]) -> Sequence[Group]:
        """What the base model said to these prompts, a mixture of both, the stored answer, and what was trained before come last, in this order."""
        asked = ((it.needs.reference_samples, it.reference_groups), (it.needs.mixture_samples, it.mixture_groups))
        for others in (table().select([group.prompt.id for group in groups]) for count, table in asked if count):
            groups = [
                group if other is None else replace(group, rollouts=(*group.rollouts, *other.rollouts))
                for group, other in zip(groups, others, strict=True)
            ]
        if it.needs.teacher:
            groups = [replace(group, rollouts=(*group.rollouts, _answer(it, group.prompt))) for group in groups]
        return with_carried(it, groups) if it.needs.carried else groups

    reuse.take(rounds.prompts)  # `generate` hands on what is in the table before it samples
    sampled = collect.generate(
        it,
        requests(rounds.prompts),
        config.sampling.spec(),
        it.groups(),
        "sample",
        version=it.sampling_version,
        feed=it.rollouts,
        more=more,
        joined=with_others,
    )
    it.report.sampled(it.number, sampled, kept=len(rounds.kept) if it.dynamic else None)
    record: SampleRecord = {
        "samples": sum(s.responses for s in sampled),
        "tokens": sum(s.tokens for s in sampled),
        "prompts": len(rounds.prompts),
        "truncated": sum(s.cut for s in sampled),
        "rejected": dict(Counter(reason for s in sampled for reason in s.rejected)),
        "next_cursor": rounds.next_cursor,
        "policy_version": it.sampling_version,
    }
    if config.selection.reuses:
        it.report.reused(it.number, reuse.by_age, reuse.tokens)
        record |= {"reused": reuse.by_age, "tokens_saved": reuse.tokens}
    if it.dynamic:
        if (shortage := rounds.shortage()) is not None:
            it.parts.tracker.note(shortage)
        record |= {"kept": rounds.kept, "useful": rounds.useful, "rounds": rounds.number, "waited": it.answers.waited}
    return record


def _answer(it: Iteration, prompt: Prompt) -> Rollout:
    """The stored answer as a response that no policy sampled.

    Raises:
        StoreError: if the prompt carries none.
    """
    if not prompt.answer_ids:
        raise StoreError(
            f"prompt {prompt.id!r} carries no stored answer, which the algorithm compares with the samples",
            field="prompts.train",
            fix="declare `answers` in the algorithm's `needs`, and start a new run",
        )
    return Rollout(
        token_ids=prompt.answer_ids,
        logprobs=(math.nan,) * len(prompt.answer_ids),
        text=str(prompt.reference_answer),
        finish_reason="stop",
        policy_version=-1,
        sampler=it.parts.config.sampling.spec(),
        seed=derive_seed(it.parts.config.seed, it.number, prompt.id, "teacher"),
        source="teacher",
    )
