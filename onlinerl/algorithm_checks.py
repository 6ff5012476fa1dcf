"""Whether algorithm, reference, sampling and oracle go together, and what a combination means where that is not obvious."""

from __future__ import annotations

from onlinerl.config import RunConfig
from onlinerl.controller.parts import reference_iteration
from onlinerl.errors import ConfigError
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols import Algorithm, Needs, Oracle
from onlinerl.types import Verdict


def check_algorithm(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """Refuse what cannot work or would do nothing; say what a combination means where it works otherwise than one might think.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    name, needs, k = config.algorithm["name"], algorithm.needs(), config.sampling.samples_per_prompt
    CATALOGUE.including(name, algorithm.metrics, algorithm.figure_metrics)
    if k < needs.min_samples:
        raise ConfigError(
            f"{name} compares responses and needs at least {needs.min_samples} per prompt, got {k}",
            field="sampling.samples_per_prompt",
            fix=f"set it to {needs.min_samples} or more",
        )
    schedule, default = config.reference.schedule, algorithm.default_reference
    if needs.reference and schedule == "none":
        raise ConfigError(
            f"{name} needs a reference",
            field="reference.schedule",
            fix=f"set it to {default}, or leave it out",
        )
    strict = default == "previous" and schedule not in ("default", "previous")
    if strict and not config.reference.allow_nonstandard:
        raise ConfigError(
            f"{name} is defined against the previous iterate, not {schedule!r}",
            field="reference.schedule",
            fix="leave it out, or set reference.allow_nonstandard=true if you mean it",
        )
    sampling = config.sampling
    if algorithm.policy_gradient and (sampling.top_p < 1 or sampling.top_k > 0):
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
    return _check_kl_in_reward(config, needs, default) if needs.kl_in_reward else []


def _check_kl_in_reward(config: RunConfig, needs: Needs, default: str) -> list[str]:
    """A penalty inside the reward is that of the policy that sampled, which pays nothing while it is the reference."""
    schedule = default if config.reference.schedule == "default" else config.reference.schedule

    def acts(iteration: int) -> bool:
        changed = iteration - 1 > needs.critic_warmup  # until then the sampling policy is the initial one
        return changed and reference_iteration(schedule, config.reference.every, iteration) != iteration - 1

    first = next((t for t in range(1, config.iterations + 1) if acts(t)), None)
    if first is None:
        moving = schedule != "fixed"
        raise ConfigError(
            "with the KL in the reward it would never act: "
            + (
                "the reference is always the policy that sampled"
                if moving
                else "the policy that samples is the reference in every iteration"
            ),
            field="reference.schedule" if moving else "algorithm.kl_in",
            fix="set algorithm.kl_in=loss, where it acts at every step" + (", or reference.schedule=fixed" if moving else ""),
        )
    return [
        f"the KL in the reward is that of the policy that sampled: it is 0 until iteration {first}, because that policy is the "
        "reference until then; algorithm.kl_in=loss acts at every step"
    ]


def implied_preferences(config: RunConfig, algorithm: Algorithm, oracle: Oracle, verdict: Verdict | None) -> list[str]:
    """What an algorithm that reads preferences makes of an oracle that only scores.

    `verdict` is what the oracle answered to a trial question; None if it was not asked.
    """
    if not algorithm.needs().preferences or (verdict is not None and verdict.preferences is not None):
        return []
    temperature = oracle.preference_temperature
    return [
        f"{config.algorithm['name']} reads how probable it is that one response beats another. Where {config.oracle['name']} only "
        f"scores, that follows from the scores by Bradley-Terry at temperature {temperature:g} (oracle.preference_temperature): a gap "
        f"of {temperature:g} means odds of 2.7 to 1, and preferences that go in a circle cannot occur"
    ]
