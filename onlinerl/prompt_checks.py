"""The prompts of a run, read and checked before anything starts: from its files, from what it keeps, or without the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onlinerl.config import RunConfig
from onlinerl.controller.parts import samples_dynamically
from onlinerl.errors import ConfigError
from onlinerl.model_checks import check_vocabulary, tokenizer
from onlinerl.prompts import _anchors
from onlinerl.prompts._kept import Kept
from onlinerl.prompts._source import ShuffledPrompts, check_answers, check_overlap, load_prompts
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Group, Prompt, RawPrompt, SelectionPlan


@dataclass(frozen=True, kw_only=True)
class Read:
    """What was read."""

    train: ShuffledPrompts | None = None
    """None if the model is not on this machine, so that prompts could not be tokenised."""
    heldout: Sequence[Prompt] = ()
    """As many as are evaluated on."""
    anchors: Sequence[Group] = ()
    """Pairs whose better response is known, if the configuration names any and the model is on this machine."""
    total: int
    """Training prompts."""
    raw: Sequence[RawPrompt] = ()
    """The same as they are written, where they could not be tokenised."""
    remarks: Sequence[str]
    """How they were read, and what was left out."""


def read_prompts(config: RunConfig, algorithm: Algorithm, oracle: Oracle, local: Path | None, kept: Kept | None) -> Read:
    """Read the prompts of a run, and see that there are enough.

    Args:
        config: of the run.
        algorithm, oracle: that are configured.
        local: the model's directory; None if it is not on this machine.
        kept: the prompts of a run that is resumed.

    Raises:
        PromptError, ConfigError: naming field, cause and fix.
    """
    if local is None:
        found = _untokenised(config, algorithm, oracle)
    elif kept is not None:
        leaves_out = config.prompts.filter_overlong_prompts
        train = ShuffledPrompts(kept.train, seed=config.seed, reuse=config.prompts.reuse)
        reads = tokenizer(config.model) if leaves_out else None
        remarks = kept.changes(config, reads, algorithm.needs.goals, oracle.directions)
        found = Read(train=train, heldout=kept.heldout, anchors=kept.anchors, total=len(train), remarks=remarks)
    else:
        found = _tokenised(config, algorithm, oracle, local)
    rounds = config.sampling.max_rounds if samples_dynamically(config, algorithm) else 1
    _check_enough(config, found.total, resumed=kept is not None, rounds=rounds)
    remarks = _check_selected(config, found.raw if found.train is None else list(found.train), rounds=rounds)
    _check_evaluated(config, found.heldout)
    return replace(found, heldout=found.heldout[: config.evaluation.prompts], remarks=[*found.remarks, *remarks])


def _tokenised(config: RunConfig, algorithm: Algorithm, oracle: Oracle, local: Path) -> Read:
    """All of both files, as the model reads them."""
    reads, needs_answers = tokenizer(config.model), oracle.needs_reference_answer
    train, heldout, remarks = load_prompts(
        config.prompts,
        reads,
        config.seed,
        needs_answers=needs_answers,
        longest_answer=config.sampling.max_new_tokens if algorithm.needs.answers else None,
        goals=algorithm.needs.goals,
        directions=oracle.directions,
    )
    check_vocabulary(local, reads, (p.token_ids + p.answer_ids + sum(p.goal_ids, ()) for p in (*train, *heldout)))
    anchors: list[Group] = []
    if config.anchors is not None:
        anchors, more = _anchors.read(config.anchors, reads, needs_answers=needs_answers)
        remarks = [*remarks, *more]
    return Read(train=train, heldout=heldout, anchors=anchors, total=len(train), remarks=remarks)


def _untokenised(config: RunConfig, algorithm: Algorithm, oracle: Oracle) -> Read:
    """What can be said of both files while the model is not on this machine."""
    train, heldout = config.prompts.raw("train"), config.prompts.raw("heldout")
    check_overlap(train, heldout)
    if oracle.needs_reference_answer:
        check_answers(train)
    if algorithm.needs.answers:
        check_answers(train, needed_by="algorithm")
    lacking = f"{config.model} is not on this machine: prompt lengths, templates and the oracle were not tried"
    return Read(total=len(train), raw=train, remarks=[*config.prompts.remarks(), lacking])


def _check_enough(config: RunConfig, total: int, *, resumed: bool, rounds: int = 1) -> None:
    """A run must not stop half-way because its prompts are used up."""
    wanted = config.prompts.per_iteration * config.iterations
    if rounds > 1 and wanted <= total < wanted * rounds and not config.prompts.reuse:
        raise ConfigError(
            f"{config.iterations} iterations of up to {rounds} rounds of {config.prompts.per_iteration} fresh prompts (dynamic sampling) "
            f"may need {wanted * rounds}, and there are {total}",
            field="sampling.max_rounds",
            fix=f"set prompts.reuse=true, lower it to {total // wanted}, or set sampling.dynamic=false",
        )
    more = (
        "set prompts.reuse=true, or start a new run with more prompts" if resumed else "add prompts, or set prompts.reuse=true"
    )
    if wanted > total and not config.prompts.reuse:
        iterations = total // config.prompts.per_iteration
        if total >= config.iterations and not resumed:
            less = f"lower it to {total // config.iterations}, "
        elif iterations:
            less = f"lower iterations to {iterations}, "
        else:
            less = "" if resumed else f"lower both, e.g. prompts.per_iteration=1 iterations={total}, "
        raise ConfigError(
            f"{config.iterations} iterations of {config.prompts.per_iteration} fresh prompts need {wanted}, and there are {total}",
            field="prompts.per_iteration",
            fix=f"{less}{more}",
        )
    if config.prompts.per_iteration > total:  # even with reuse, no prompt comes twice in one iteration
        raise ConfigError(
            f"asks for {config.prompts.per_iteration} different prompts at once, and there are {total}",
            field="prompts.per_iteration",
            fix=f"lower it to {total}, or add prompts",
        )


def _planned(config: RunConfig, prompts: Sequence[Prompt] | Sequence[RawPrompt], rounds: int) -> SelectionPlan:
    """What a selector is told of the run. `rounds`: how often an iteration samples at most."""
    return SelectionPlan(
        prompts=prompts,
        iterations=config.iterations,
        seed=config.seed,
        per_iteration=config.prompts.per_iteration,
        rounds=rounds,
        samples_per_prompt=config.sampling.samples_per_prompt,
        reuse=config.prompts.reuse,
        max_lag=config.schedule.max_lag,
    )


def _check_selected(config: RunConfig, prompts: Sequence[Prompt] | Sequence[RawPrompt], *, rounds: int) -> list[str]:
    """Whether the selector can choose from these prompts, and how much is sampled where it reuses responses."""
    plan, selector, sampling = _planned(config, prompts, rounds), config.selection, config.sampling
    if (objection := selector.objection(plan)) is not None:
        raise ConfigError(objection.cause, field=objection.field, fix=objection.fix)
    if not selector.reuses:
        return []
    wanted, most = plan.iterations * plan.rounds * plan.per_iteration, selector.most_sampled(plan)
    responses = most * sampling.samples_per_prompt
    return [
        f"{selector.name}: responses of earlier iterations are trained on once more; of {wanted} prompts in {plan.iterations} iterations at most "
        f"{most} are sampled: {responses} responses, up to {responses * sampling.max_new_tokens} tokens"
    ]


def most_sampled(config: RunConfig, algorithm: Algorithm, prompts: Sequence[Prompt]) -> int | None:
    """How many of its prompts a run samples at most where responses are reused; None where each of them is sampled."""
    rounds = config.sampling.max_rounds if samples_dynamically(config, algorithm) else 1
    return config.selection.most_sampled(_planned(config, prompts, rounds)) if config.selection.reuses else None


def _check_evaluated(config: RunConfig, heldout: Sequence[Prompt]) -> None:
    if heldout and config.evaluation.prompts is not None and config.evaluation.prompts > len(heldout):
        raise ConfigError(
            f"asks for {config.evaluation.prompts} held-out prompts, and there are {len(heldout)}",
            field="evaluation.prompts",
            fix=f"lower it to {len(heldout)}",
        )
