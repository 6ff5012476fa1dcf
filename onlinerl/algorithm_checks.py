"""Whether algorithm, reference, sampling and oracle go together, and what a combination means where that is not obvious."""

from __future__ import annotations

from math import ceil

from onlinerl.config import ReferenceConfig, RunConfig, SamplingConfig, pair_builder
from onlinerl.controller.parts import reference_iteration, samples_dynamically
from onlinerl.errors import ConfigError
from onlinerl.label_checks import check_labels
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.needs import Needs
from onlinerl.repeat_checks import check_repeats
from onlinerl.types import Plan


def check_algorithm(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """Refuse what cannot work or would do nothing; say what a combination means where it works otherwise than one might think.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    name, needs, k = config.algorithm["name"], algorithm.needs, config.sampling.samples_per_prompt
    CATALOGUE.including(algorithm.metrics, name)
    _check_declarations(name, needs)
    least = needs.min_samples - len(needs.beside_samples)
    if k < least:
        raise ConfigError(
            f"{name} compares responses and needs at least {least} per prompt, got {k}",
            field="sampling.samples_per_prompt",
            fix=f"set it to {least} or more",
        )
    if needs.reference and config.reference.schedule == "none":
        raise ConfigError(
            f"{name} needs a reference",
            field="reference.schedule",
            fix=f"set it to {algorithm.reference}, or leave it out",
        )
    if _is_nonstandard(config, algorithm) and not config.reference.allow_nonstandard:
        raise ConfigError(
            f"{name} is defined against the previous iterate, not {config.reference.schedule!r}",
            field="reference.schedule",
            fix="leave it out, or set reference.allow_nonstandard=true if you mean it",
        )
    sampling = config.sampling
    if needs.sampling_temperature and (sampling.top_p < 1 or sampling.top_k > 0):
        raise ConfigError(
            f"{name} weighs samples by their probability, which top_p and top_k change in a way the learner cannot score",
            field="sampling.top_p" if sampling.top_p < 1 else "sampling.top_k",
            fix="set top_p to 1.0 and top_k to -1",
        )
    if needs.critic_warmup >= config.iterations:
        raise ConfigError(
            f"is {needs.critic_warmup}, and there are {config.iterations} iterations: the policy would never learn",
            field="algorithm.critic_warmup",
            fix=f"lower it below {config.iterations}, or raise iterations",
        )
    _check_reference_samples(config, algorithm)
    _check_prefixes(config, algorithm)
    mixed = _mixtures(config, algorithm)
    _check_merging(config, algorithm)
    check_repeats(config, algorithm)
    plan = planned(config, algorithm)
    check_labels(config, algorithm)
    objection = algorithm.objection(plan)
    if objection is not None:
        raise ConfigError(objection.cause, field=objection.field, fix=objection.fix)
    paid = _kl_in_reward(config, algorithm, plan)
    return [*_stale(config, algorithm), *mixed, *paid, *_dynamic(config, algorithm), *algorithm.remarks(plan)]


def _check_declarations(name: str, needs: Needs) -> None:
    """Refuse needs that contradict each other.

    Raises:
        ConfigError: naming the algorithm.
    """
    if needs.reference_kl and not needs.reference:
        raise ConfigError(
            f"{name} declares `reference_kl` and no `reference`, so there is no model that the KL could be from",
            field="algorithm.name",
            fix="declare both in its `needs`",
        )
    if needs.teacher and not needs.answers:
        raise ConfigError(
            f"{name} declares `teacher` and no `answers`, so there is nothing that could join the samples",
            field="algorithm.name",
            fix="declare both in its `needs`",
        )
    if needs.auxiliary and (needs.reference or needs.values):
        raise ConfigError(
            f"{name} declares `auxiliary`, whose log-probs are in the place of a reference's, and "
            f"{'a `reference`' if needs.reference else 'a `critic`, of which each pass would need its own values'}",
            field="algorithm.name",
            fix="declare one of the two in its `needs`",
        )
    if needs.stage_reference and (not needs.reference or needs.reference_kl):
        raise ConfigError(
            f"{name} declares `stage_reference`, which is a policy of the moment, and "
            + ("`reference_kl`, for which the reference is a saved model" if needs.reference_kl else "no `reference`"),
            field="algorithm.name",
            fix="correct its `needs`",
        )
    if needs.sampling_temperature and (needs.greedy or needs.reference_samples):
        raise ConfigError(
            f"{name} weighs samples by their probability, and asks for responses that were not drawn from the policy",
            field="algorithm.name",
            fix="correct its `needs`, or choose another algorithm",
        )


def _dynamic(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """What dynamic sampling does.

    Raises:
        ConfigError: if it cannot work.
    """
    sampling = config.sampling
    if not samples_dynamically(config, algorithm):
        return []
    asked_for = "sampling.dynamic" if sampling.dynamic else f"{config.algorithm['name']}, as its paper has it,"
    if not config.schedule.stream:
        raise ConfigError(
            f"is false, and {asked_for} asks for dynamic sampling, which must know verdicts while it samples",
            field="schedule.stream",
            fix="set it to true, or sampling.dynamic=false",
        )
    if sampling.samples_per_prompt < 2:
        raise ConfigError(
            "is true, and with one response to each prompt there is nothing to tell apart",
            field="sampling.dynamic",
            fix="set sampling.samples_per_prompt to 2 or more, or leave it out",
        )
    return [
        f"dynamic sampling: prompts whose responses are all judged alike are replaced, in at most {sampling.max_rounds} rounds of "
        f"{config.prompts.per_iteration} prompts an iteration (sampling.max_rounds), which then goes on with what there is"
    ]


def _check_reference_samples(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse runs in which the learner cannot lend the engine the base model.

    Raises:
        ConfigError: naming the field.
    """
    if not algorithm.needs.reference_samples:
        return
    name = config.algorithm["name"]
    if config.schedule.max_lag:
        raise ConfigError(
            f"is 1, and {name} samples the base model too: the learner would have to push it, and the policy back, while it trains",
            field="schedule.max_lag",
            fix="set it to 0",
        )
    if config.cluster.colocate:
        raise ConfigError(
            f"is true, and {name} samples the base model too: its weights and the policy's would have to be on the shared GPU in one push",
            field="cluster.colocate",
            fix="set it to false, which needs GPUs for the engine and for the learner",
        )
    if samples_dynamically(config, algorithm):
        raise ConfigError(
            f"is true, and {name} samples the base model first: it would have nothing on the prompts that come in later",
            field="sampling.dynamic",
            fix="leave it out",
        )


def _mixtures(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """What responses of a mixture of policy and reference cost.

    Raises:
        ConfigError: if the learner cannot draw them.
    """
    name, needs, sampling = config.algorithm["name"], algorithm.needs, config.sampling
    if not needs.mixture_samples:
        return []
    if not needs.reference:
        raise ConfigError(
            f"{name} declares `mixture_samples` and no `reference`, of which the mixture would be",
            field="algorithm.name",
            fix="declare both in its `needs`",
        )
    if not config.learner.samples_mixtures:
        raise ConfigError(
            f"is {config.learner.name}, and {name} asks for responses of a mixture of policy and reference, which this learner does not draw",
            field="learner.name",
            fix="set it to deepspeed or torch",
        )
    if config.schedule.max_lag:
        raise ConfigError(
            f"is 1, and {name} asks the learner for responses of the policy that is sampled, while it would train the next one",
            field="schedule.max_lag",
            fix="set it to 0",
        )
    if samples_dynamically(config, algorithm):
        raise ConfigError(
            f"is true, and {name} has responses of a mixture drawn first: there would be none to the prompts that come in later",
            field="sampling.dynamic",
            fix="leave it out",
        )
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ConfigError(
            f"{name} asks for responses of a mixture of two models, which is of all their tokens",
            field="sampling.top_p" if sampling.top_p < 1 else "sampling.top_k",
            fix="set top_p to 1.0 and top_k to -1",
        )
    asked = config.prompts.per_iteration * needs.mixture_samples
    return [
        f"the learner draws {asked} responses of the mixture an iteration itself, before the engine samples: up to {sampling.max_new_tokens} "
        "forward passes of policy and reference over each micro-batch of them, without the engine's kernels"
    ]


def _check_prefixes(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse engines that cannot let responses begin with given tokens.

    Raises:
        ConfigError: naming the engine.
    """
    name, needs = config.algorithm["name"], algorithm.needs
    if not needs.prefix:
        return
    if not needs.answers:
        raise ConfigError(
            f"{name} declares `prefix` and no `answers`, so there is nothing that responses could begin with",
            field="algorithm.name",
            fix="declare both in its `needs`",
        )
    if not config.engine.forces_prefixes:
        raise ConfigError(
            f"is {config.engine.name}, and {name} as configured lets responses begin with tokens of a stored answer, of which this engine "
            "does not give the whole text",
            field="engine.name",
            fix="set it to vllm, or algorithm.p_reset=0" if "p_reset" in type(algorithm).model_fields else "set it to vllm",
        )
    if config.sampling.max_new_tokens < 2:
        raise ConfigError(
            f"is {config.sampling.max_new_tokens}, and a response that begins with a token needs room for another",
            field="sampling.max_new_tokens",
            fix="set it to 2 or more",
        )


def _check_merging(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse runs in which what is trained cannot be merged.

    Raises:
        ConfigError: naming the field.
    """
    section, training = "training.online_merging", config.training
    if training.online_merging is None:
        return
    if not config.learner.merges:
        raise ConfigError(
            f"is on, and the learner {config.learner.name!r} does not let the weights that its optimizer steps be replaced",
            field=section,
            fix="set learner.name=torch, or leave it out",
        )
    if training.weight_decay > 0:
        raise ConfigError(
            f"is {training.weight_decay}, and what decays at each step would be merged with the rest; in the paper it decays after merging",
            field="training.weight_decay",
            fix="set it to 0",
        )
    if algorithm.needs.auxiliary:
        raise ConfigError(
            "is on, and an iteration trains twice, auxiliary weights and then the policy from them: which of both to merge is defined nowhere",
            field=section,
            fix="leave it out, or choose another algorithm.name",
        )
    if algorithm.needs.critic_warmup:
        raise ConfigError(
            "is on, and while only the critic learns (algorithm.critic_warmup) there is nothing to merge",
            field=section,
            fix="set algorithm.critic_warmup=0, or leave it out",
        )


def _kl_in_reward(config: RunConfig, algorithm: Algorithm, plan: Plan) -> list[str]:
    """From when on a KL in the reward acts. It does not change while the policy is trained on what was sampled.

    Raises:
        ConfigError: if it never would.
    """
    if not algorithm.needs.kl_in_reward:
        return []
    movable = "kl_in" in type(algorithm).model_fields
    changed = range(algorithm.needs.critic_warmup + 2, plan.iterations + 1)  # until then it is the base model that samples
    first = next((t for t in changed if plan.references[t - 1] != t - 1), None)
    if first is None:
        moving = any(plan.references)
        raise ConfigError(
            "with the KL in the reward it would never act: "
            + (
                "the reference is always the policy that sampled"
                if moving
                else "the policy that samples is always the base model"
            ),
            field="reference.schedule" if moving else "algorithm.kl_in" if movable else "algorithm.kl_coef",
            fix=("set algorithm.kl_in=loss, where it acts at every step" if movable else "set algorithm.kl_coef=0")
            + (", or reference.schedule=fixed" if moving else "" if movable else ", or raise iterations"),
        )
    if plan.max_lag or config.selection.reuses:
        older = "schedule.max_lag" if plan.max_lag else "selection.name"
        return [
            f"the KL in the reward is that of the policy which training starts from, on responses of an older one ({older}): a "
            "biased estimate" + ("; algorithm.kl_in=loss does not depend on who sampled" if movable else "")
        ]
    return [
        f"the KL in the reward is that of the policy that sampled: it is 0 until iteration {first}, because that policy is the reference "
        "until then" + ("; algorithm.kl_in=loss acts at every step" if movable else "")
    ]


def _stale(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """What an algorithm makes of responses of an older policy.

    Raises:
        ConfigError: if it would be wrong.
    """
    name, declared, selector = config.algorithm["name"], algorithm.needs.off_policy, config.selection
    lags = config.schedule.max_lag > 0
    if not (lags or selector.reuses) or declared in ("valid", "corrected"):
        return []
    if declared == "refused":
        other = "set it to 0" if lags else "set it to shuffled"
        raise ConfigError(
            ("is 1" if lags else f"is {selector.name}, which has responses of older policies trained on once more")
            + f", and {name} as configured takes every response for one of the policy that training starts from",
            field="schedule.max_lag" if lags else "selection.name",
            fix=f"set algorithm.importance_sampling_cap, which corrects for older ones, or {other.removeprefix('set ')}"
            if "importance_sampling_cap" in type(algorithm).model_fields
            else f"{other}, or choose another algorithm",
        )
    why = " and ".join(["schedule.max_lag=1"] * lags + [f"selection.name={selector.name}"] * selector.reuses)
    return [
        f"{name} is about responses, and win rates, of the policy that training starts from; with {why} they are those of "
        f"{'older policies' if selector.reuses else 'the policy before it'}, and nothing corrects for that"
    ]


def most_items(config: RunConfig, algorithm: Algorithm) -> int:
    """That an iteration trains at most."""
    judged = config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples)
    new = config.prompts.per_iteration * algorithm.most_items(judged, pair_builder(config).most(judged))
    return new + sum(int(share * new) for share in algorithm.needs.replay[: config.iterations - 1])


def most_steps(config: RunConfig, algorithm: Algorithm) -> int:
    """Optimizer steps that a pass over them takes at most, all epochs."""
    return ceil(most_items(config, algorithm) / config.training.batch_size) * config.training.epochs


def _check_target_kl(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse a KL that nothing can exceed.

    Raises:
        ConfigError: if there is no step after the first one.
    """
    target = config.training.target_kl
    if target is not None and most_steps(config, algorithm) < 2:
        raise ConfigError(
            f"is {target:g}, and nothing would read it: there is at most one optimizer step at a time, before which the KL is 0",
            field="training.target_kl",
            fix="leave it out, lower training.batch_size, or raise training.epochs",
        )


def check_sections(config: RunConfig, algorithm: Algorithm) -> None:
    """Refuse what is set and nothing reads.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    _check_target_kl(config, algorithm)
    name, reference, defaults = config.algorithm["name"], config.reference, ReferenceConfig()
    if config.pairing is not None and not algorithm.needs.pairs:
        raise ConfigError(
            f"{name} trains no pairs, so nothing would read it",
            field="pairing",
            fix="leave it out (pairing=null on the command line), or choose an algorithm that trains pairs",
        )
    if config.sampling.max_rounds != SamplingConfig().max_rounds and not samples_dynamically(config, algorithm):
        raise ConfigError(
            f"is {config.sampling.max_rounds}, and nothing would read it: {name} as configured does not sample dynamically",
            field="sampling.max_rounds",
            fix="leave it out, or set sampling.dynamic=true",
        )
    unread = {
        "schedule": not algorithm.needs.reference and reference.schedule != "none",
        "every": reference.schedule not in ("every_n", "ema") or not algorithm.needs.reference,
        "mixup_alpha": reference.schedule != "ema" or not algorithm.needs.reference,
        "allow_nonstandard": not _is_nonstandard(config, algorithm),
    }
    for key, nothing_reads_it in unread.items():
        value = reference.model_dump()[key]
        if nothing_reads_it and value != defaults.model_dump()[key]:
            raise ConfigError(
                f"is {value}, and nothing would read it: "
                + (
                    f"{name} with this schedule does not"
                    if algorithm.needs.reference
                    else f"{name} as configured needs no reference"
                ),
                field=f"reference.{key}",
                fix="leave it out",
            )


def _is_nonstandard(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether the reference is another one than the algorithm's theory asks for."""
    return algorithm.reference == "previous" and config.reference.schedule not in ("default", "previous")


def planned(config: RunConfig, algorithm: Algorithm) -> Plan:
    """What the algorithm is told of the run."""
    chosen = config.reference
    schedule = algorithm.reference if chosen.schedule == "default" else chosen.schedule
    references = (reference_iteration(schedule, chosen.every, t) for t in range(1, config.iterations + 1))
    averaged = schedule == "ema" and chosen.mixup_alpha < 1
    return Plan(
        iterations=config.iterations,
        references=tuple("ema" if averaged and iterate else iterate for iterate in references),
        max_lag=config.schedule.max_lag,
        max_new_tokens=config.sampling.max_new_tokens,
        samples_per_prompt=config.sampling.samples_per_prompt,
    )
