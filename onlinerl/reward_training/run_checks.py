"""Whether the oracle of a run can get other weights between its iterations, by training or from the policy, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

from onlinerl import config as configuration
from onlinerl import hardware, hub, oracle_requests, weight_files
from onlinerl.config import RunConfig
from onlinerl.controller.parts import samples_dynamically
from onlinerl.errors import ConfigError
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.refreshing import Refreshing
from onlinerl.reward_training import checks, in_a_run
from onlinerl.types import Prompt

GIB = 2**30


def check(config: RunConfig, algorithm: Algorithm, oracle: Oracle, prompts: Sequence[Prompt]) -> list[str]:
    """What to know about it; nothing where the oracle stays as it is.

    Args:
        config, algorithm, oracle: of the run.
        prompts: that it trains on, if they are known.

    Raises:
        ConfigError: if it cannot be done, naming field, cause and fix.
    """
    if (nested := next(_nested(oracle, "oracle"), None)) is not None:
        raise ConfigError(
            "gets other weights between iterations, and another oracle asks it: only the oracle of the run itself can",
            field=f"{nested}.name",
            fix="write it as the oracle itself; or, of `refreshed`, put its `base` in its place; or, of `self_judge`, set judge_version=initial",
        )
    if oracle.following is not None:
        return _following(config, algorithm)
    plan = oracle.refreshing
    if plan is None:
        return []
    _check_place(config)
    _check_schedule(config, algorithm, "choose the oracle that oracle.base is")
    notes = [_turns(config, algorithm, plan)]
    if (told := oracle_requests.of_refresh(config, algorithm, oracle, prompts)) is not None:
        notes += [told.text, *told.beyond(config.ledger)]
    if config.selection.reads_scores:
        notes.append(
            f"selection.name={config.selection.name} reads scores of several versions of the reward model: those of a prompt are of the version that "
            "judged it last"
        )
    return [*notes, *_model(config, plan)]


def _nested(oracle: Oracle, section: str) -> Iterator[str]:
    """Sections of oracles inside others that would get other weights."""
    for key, each in oracle.inner().items():
        if each.refreshing is not None or each.following is not None:
            yield f"{section}.{key}"
        yield from _nested(each, f"{section}.{key}")


def _following(config: RunConfig, algorithm: Algorithm) -> list[str]:
    """What to know about an oracle that is the iterate which an iteration samples from.

    Raises:
        ConfigError: if nothing that stays watches it, or it would wait for itself.
    """
    if config.anchors is None:
        raise ConfigError(
            f"is left out, and the judge of {config.oracle['name']} as configured moves with the policy: nothing that stays as it is would show "
            "where it goes",
            field="anchors",
            fix="give anchors.data, pairs whose better response is known, and anchors.min_accuracy; or choose weights that stay: "
            "oracle.judge_version=initial of self_judge, oracle.policy of implicit",
        )
    _check_schedule(config, algorithm, "choose weights that stay (oracle.judge_version=initial, oracle.policy)")
    return [
        "the oracle takes on the weights of the iterate that each iteration samples from: one version in an iteration, another one in the next. "
        "Before each iteration it is examined by the pairs of `anchors`"
    ]


def _check_place(config: RunConfig) -> None:
    """It is trained in the controller's process, for which nothing is reserved elsewhere."""
    if config.cluster.address is not None:
        raise ConfigError(
            "is set, and the reward model is trained on the controller's machine, where the cluster reserves nothing for it",
            field="cluster.address",
            fix="leave it out, or choose the oracle that oracle.base is",
        )
    if not configuration.runs_on_cpu(config):
        raise ConfigError(
            f"is {config.cluster.device}, so that the run is on GPUs, and none is reserved for the training of the reward model",
            field="cluster.device",
            fix="set it to cpu, or choose the oracle that oracle.base is and train it between two runs (`onlinerl train-rm`, preferences.runs)",
        )


def _check_schedule(config: RunConfig, algorithm: Algorithm, fix: str) -> None:
    """What would wait for itself, or mix what two versions have said."""
    if samples_dynamically(config, algorithm) and config.schedule.max_lag:
        raise ConfigError(
            "is 1, and with dynamic sampling an iteration waits for verdicts of the version that the one before it leaves, while that one waits "
            "for this one's samples",
            field="schedule.max_lag",
            fix="set it to 0, or sampling.dynamic=false",
        )
    if algorithm.needs.replay:
        raise ConfigError(
            f"{config.algorithm['name']} as configured trains items of earlier iterations once more, with what an older version of the oracle "
            "has said of them",
            field="oracle.name",
            fix=fix + ", or set algorithm.replay=0" * ("replay" in type(algorithm).model_fields),
        )


def _turns(config: RunConfig, algorithm: Algorithm, plan: Refreshing) -> str:
    """When it is trained, and on how much.

    Raises:
        ConfigError: if it never would be.
    """
    drawn = config.sampling.samples_per_prompt + len(algorithm.needs.beside_samples)
    groups, iterations = min(plan.prompts, config.prompts.per_iteration), config.iterations
    pairs = groups * comb(drawn, 2)
    if plan.every > iterations:
        raise ConfigError(
            f"is {plan.every}, and there are {iterations} iterations: the reward model would never be trained",
            field="oracle.every",
            fix=f"lower it to {iterations} at most, or raise iterations",
        )
    turns = iterations // plan.every * plan.every
    if pairs * turns < plan.min_new_labels:
        raise ConfigError(
            f"is {plan.min_new_labels}, and in {turns} iterations there are at most {pairs * turns} pairs of responses: the reward model would never "
            "be trained",
            field="oracle.min_new_labels",
            fix=f"lower it to {pairs * plan.every}, or raise oracle.prompts, prompts.per_iteration, sampling.samples_per_prompt or iterations",
        )
    every = "each iteration" if plan.every == 1 else f"every {plan.every} iterations"
    return (
        f"after {every} the reward model is trained further where there are {plan.min_new_labels} new pairs or more: at most {pairs} an iteration, of "
        f"{groups} prompts, about {plan.heldout_share:.0%} of them held out. Rewards of different versions cannot be compared"
    )


def _model(config: RunConfig, plan: Refreshing) -> list[str]:
    """What its training keeps in memory and on the disk.

    Raises:
        ConfigError: if it cannot be trained, or this machine has too little memory.
    """
    local = hub.local(plan.path)
    if local is None:
        return []
    trainer = in_a_run.Trainer(plan=plan, config=config, folder=config.directory / in_a_run.FOLDER)
    with in_a_run.explained():
        checks.check_kind(trainer.configured(1, str(local)), local)
    parameters = weight_files.parameters(plan.path, local)
    if parameters is None:
        return ["training the reward model: its size is not known, so no memory was estimated"]
    needed = sum(size for name, size in in_a_run.learner().memory(parameters).items() if name != "reference")
    said = f"training the reward model ({parameters / 1e9:.2f} B parameters) takes {needed / GIB:.1f} GiB of memory beside the rest, activations come on top"
    there = hardware.memory()
    if there is not None and needed > there[0]:
        raise ConfigError(
            f"{said}, and this machine has {there[0] / GIB:.1f} GiB",
            field="oracle.base.path",
            fix="choose a smaller reward model, or the oracle that oracle.base is, and train it between two runs on another machine",
        )
    few = there is not None and needed > there[1]
    return [said + (f", and {there[1] / GIB:.1f} GiB are left: Ray would end a process" if few and there is not None else "")]
