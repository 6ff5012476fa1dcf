"""Everything that can be found wrong before anything expensive starts. Needs no vLLM, Ray or DeepSpeed."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from onlinerl import config as configuration
from onlinerl import hardware, hub, memory_checks, placement, weight_files
from onlinerl.algorithm_checks import check_algorithm, check_sections, most_items, most_steps
from onlinerl.config import RunConfig, at_home
from onlinerl.controller.asking import answers
from onlinerl.errors import ConfigError, OracleError, StoreError
from onlinerl.families import check_experts
from onlinerl.lora_checks import adapter_parameters, check_lora
from onlinerl.model_checks import check_critic, check_description, check_tensors, check_weights, tokenizer
from onlinerl.oracle_checks import check_directions
from onlinerl.prompt_checks import read_prompts
from onlinerl.prompts._kept import Kept
from onlinerl.prompts._source import ShuffledPrompts
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.keys import decided
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.protocols.transport import Layout
from onlinerl.stores._files import require_free
from onlinerl.types import Cost, Failure, Group, Prompt, Query, Verdict


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that has passed, with what was built on the way."""

    config: RunConfig
    """With `model` as an absolute directory, if it is on this machine."""
    algorithm: Algorithm
    oracle: Oracle
    pairing: PairBuilder
    train: ShuffledPrompts | None
    """None if the model is not on this machine, so that prompts could not be tokenised."""
    heldout: Sequence[Prompt]
    anchors: Sequence[Group] = ()
    """Pairs whose better response is known; none too if the model is not on this machine."""
    parameters: float | None
    """Number of parameters of the model, if it could be found out."""
    adapters: float | None = None
    """Of those that are trained in its adapters; None if all are trained."""
    notes: Sequence[str]
    """The derived numbers, and what could not be checked."""
    oracle_scores: bool = True
    """Whether the oracle scores single responses, or only compares."""
    oracle_version: str | None = None
    """Of the oracle, as it says with its verdicts; None until it was tried."""
    trial: Cost | None = None
    """What that has cost, with what it has asked before; None until then."""

    def tried(self, verdict: Verdict, before: Cost | None = None) -> Checked:
        """The same with what a trial of the oracle has shown, and what trials of those that it asks have cost."""
        cost = verdict.cost.plus(self.oracle.opening_cost).plus(before or Cost())
        return replace(self, oracle_scores=verdict.scores is not None, oracle_version=verdict.oracle_version, trial=cost)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response that the engine must hold, rounded up to a KV-cache block."""
        return self.config.engine.max_model_len or ceil((self.longest + 1) / 16) * 16

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and a response that uses its whole budget."""
        prompts = [*(self.train or []), *self.heldout]
        longest = max((len(ids) for p in prompts for ids in (p.token_ids, *p.goal_ids)), default=self.config.prompts.max_tokens)
        return longest + self.config.sampling.max_new_tokens

    @property
    def state_bytes(self) -> int:
        """Size of one checkpoint (fp32 weights, two moments, weights as trained), one export, and the reference where that is an average
        in fp32. Of adapters, the checkpoint holds nothing else, and the export has them beside it."""
        averaged = self.algorithm.needs.reference and self.config.reference.schedule == "ema"
        trained = self.parameters if self.adapters is None else self.adapters
        average = 4 * averaged * (self.parameters or 0)
        return int(self.export_bytes + average + (trained or 0) * (12 + self.bytes_per_weight))

    @property
    def export_bytes(self) -> int:
        """Size of one export: the weights as trained, and adapters beside them."""
        return int(((self.parameters or 0) + (self.adapters or 0)) * self.bytes_per_weight)

    @property
    def kept_bytes(self) -> int:
        """What the run leaves on the disk when it is finished, without its tables."""
        said, trained = self.config.checkpoints, self.config.iterations
        removed = said.when_finished == "remove"
        exports = {"all": trained, "last": 1 if removed else 2, "best": 2 if removed else 3}[said.exports]
        checkpoints = 0 if removed else min(said.keep, trained) * (self.state_bytes - self.export_bytes)
        return checkpoints + min(exports, trained) * self.export_bytes

    @property
    def bytes_per_weight(self) -> int:
        """Of the learner's weights."""
        return 4 if self.config.learner.dtype == "float32" else 2


def check(config: RunConfig, kept: Kept | None = None) -> Checked:
    """Validate everything that does not need the cluster.

    Args:
        config: what to check, as `onlinerl.config.settled` gives it.
        kept: the prompts of the run that is resumed: what it goes on with, whatever has become of the files.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    decided(config.engine.dtype, "engine.dtype")
    decided(config.learner.dtype, "learner.dtype")
    config.learner.check()
    algorithm, oracle, pairing = (
        configuration.algorithm(config),
        configuration.oracle(config),
        configuration.pair_builder(config),
    )
    check_directions(config, algorithm, oracle)
    if kept is None:  # what a run was started with by an older version, it may go on with
        check_sections(config, algorithm)
    notes = [
        derived(config, algorithm),
        *_precision(config),
        *check_algorithm(config, algorithm),
        *check_lora(config, algorithm),
    ]
    _check_schedule(config)
    _check_layout(config)
    for tracker in config.metrics.all():
        tracker.check()
    check_writable(config.directory)
    local = check_model(config.model)
    if local is not None:  # from here on by its place: other processes may have another working directory
        config = config.model_copy(update={"model": str(local)})
        check_description(local, config.learner.attn_implementation, padding_free=config.learner.padding_free)
    parameters = weight_files.parameters(config.model, local)
    if local is not None:
        check_weights(local)
    _check_merging(config, local)
    _check_experts(config, local)
    prompts = read_prompts(config, algorithm, oracle, local, kept)
    notes += prompts.remarks
    critic, folder = _critic(config, algorithm, local, parameters)
    adapters = _adapters(config, [local, folder or local] if critic else [local])
    notes += memory_checks.check_memory(config, parameters, critic=critic or 0, adapters=adapters)
    checked = Checked(
        config=config,
        algorithm=algorithm,
        oracle=oracle,
        pairing=pairing,
        train=prompts.train,
        heldout=prompts.heldout,
        anchors=prompts.anchors,
        parameters=parameters,
        adapters=adapters,
        notes=notes,
    )
    if local is not None:
        _check_lengths(checked, local)
        _check_engine(checked, local)
        if kept is None:  # one that is resumed may have its last checkpoint
            _check_room(checked)
    return checked


def _critic(
    config: RunConfig, algorithm: Algorithm, local: Path | None, parameters: float | None
) -> tuple[float | None, Path | None]:
    """Parameters of a second network that is trained, and the directory of the model that it begins as, if that is here."""
    model = algorithm.needs.critic_model
    if model is None:
        return parameters if algorithm.needs.critic == "separate" else 0, None
    folder = check_model(model, "algorithm.critic_model")
    if folder is not None and local is not None:
        check_critic(folder, local, tokenizer(config.model))
    return weight_files.parameters(model, folder), folder


def probe_oracle(oracle: Oracle, prompt: Prompt) -> Verdict:
    """Ask the oracle once, about two plainly different responses, before anything heavy starts.

    Returns:
        What it said. An oracle that gives no scores here only compares, and is never asked about a single response.

    Raises:
        OracleError: if it raises, fails, does not answer in time, or answers in the wrong shape.
    """
    oracle.open()
    trial = Query(prompt=prompt, responses=(" It was good.", " It was bad, the answer is 7."))
    ((_, result),) = next(answers(oracle, [trial]))
    if isinstance(result, Failure):
        raise OracleError(f"failed on a trial query ({result.kind}): {result.message}", field="oracle", fix="repair the oracle")
    return result


def derived(config: RunConfig, algorithm: Algorithm) -> str:
    """The batch-like numbers that follow from the ones that were set."""
    prompts, k, per_step = config.prompts.per_iteration, config.sampling.samples_per_prompt, config.training.batch_size
    beside = algorithm.needs.beside_samples
    items = most_items(config, algorithm)
    what = "pairs" if algorithm.needs.pairs else "items"
    drawn = f"{k} sample{'s' if k > 1 or not beside else ''}"
    samples = " + ".join([drawn, *(f"{n} {source} response{'s' if n > 1 else ''}" for source, n in Counter(beside).items())])
    passes = 2 if algorithm.needs.auxiliary else 1
    steps = most_steps(config, algorithm) * passes
    return (
        f"{prompts} prompts x {f'({samples})' if beside else samples} -> at most {items} {what} -> at most {steps} optimizer steps an iteration "
        f"({per_step} {what} a step, {config.training.epochs} epoch{'s' if config.training.epochs > 1 else ''}"
        f"{f', {passes} passes' if passes > 1 else ''}); "
        f"{config.iterations} iterations"
    )


def identity(model: str) -> dict[str, str]:
    """What a model is, cheaply; see `weight_files.checksums`."""
    path = hub.local(model)
    return {"model": model} if path is None else {"model": model, **weight_files.checksums(path)}


def _check_schedule(config: RunConfig) -> None:
    """Nothing can be scheduled around a learning rate of 0 (a critic may still learn, at its own constant rate)."""
    training = config.training
    if training.learning_rate == 0 and (
        training.lr_scheduler_type != "constant" or training.warmup_ratio > 0 or training.iteration_decay < 1
    ):
        raise ConfigError(
            "is 0, so lr_scheduler_type, warmup_ratio and iteration_decay would do nothing",
            field="training.learning_rate",
            fix="leave the three out, or set a learning rate",
        )


def _check_merging(config: RunConfig, local: Path | None) -> None:
    """Whether there is what `training.online_merging` merges with."""
    merging, field = config.training.online_merging, "training.online_merging.base_model"
    if merging is None:
        return
    folder = check_model(merging.base_model, field)
    if folder is None:
        fix = f"download it first: hf download {merging.base_model}"
        raise ConfigError(f"{merging.base_model} is not on this machine", field=field, fix=fix)
    if local is not None:
        check_tensors(local, folder, field)


def _check_experts(config: RunConfig, local: Path | None) -> None:
    """Whether there are routers to balance, and a learner that does."""
    if not config.training.aux_loss_coef:
        return
    if not config.learner.balances_experts:
        raise ConfigError(
            f"is {config.training.aux_loss_coef:g}, and the learner {config.learner.name!r} has no experts to balance",
            field="training.aux_loss_coef",
            fix="leave it out, or set learner.name to deepspeed or torch",
        )
    if local is not None:
        check_experts(json.loads((local / "config.json").read_text()))


def _adapters(config: RunConfig, networks: Sequence[Path | None]) -> float | None:
    """Parameters of the adapters of these networks, as far as they are on this machine; None if all weights are trained."""
    lora = config.learner.lora
    return None if lora is None else sum(adapter_parameters(lora, each) or 0 for each in networks if each is not None)


def _check_layout(config: RunConfig) -> None:
    if config.engine.in_process != config.learner.in_process:
        here, there = ("learner", "engine") if config.learner.in_process else ("engine", "learner")
        raise ConfigError(
            f"engine {config.engine.name!r} and learner {config.learner.name!r} do not go together: the {here} runs in this process, "
            f"the {there} on the cluster",
            field="engine.name",
            fix="choose both of one kind, e.g. vllm with deepspeed (toy with toy in tests)",
        )
    placement.require_fleet(config)
    device = None if config.cluster.device == "auto" else config.cluster.device
    if device == "cpu" and config.cluster.colocate:
        raise ConfigError("needs GPUs, and cluster.device is cpu", field="cluster.colocate", fix="leave it out on CPUs")
    threads = config.engine.threads and config.learner.threads
    # On several machines it is known only once the parts have their places.
    same_cores = (
        not config.engine.in_process and config.cluster.address is None and configuration.runs_on_cpu(config) and not threads
    )
    placement.require_apart(config, cores_are_shared=same_cores)
    if config.cluster.colocate:
        placement.require_shareable(config)
    config.sync.check(Layout(device=device, colocated=config.cluster.colocate, joins=config.engine.joins_transfers))


def _check_lengths(checked: Checked, model: Path) -> None:
    """A limit that is too small would cut responses short without a word."""
    wanted, chosen = checked.longest, checked.config.engine.max_model_len
    if chosen is not None and chosen <= wanted:
        raise ConfigError(
            f"is {chosen}, and the longest prompt with its response can have {wanted} tokens",
            field="engine.max_model_len",
            fix=f"set it to {wanted + 1} or more, or leave it out; or lower sampling.max_new_tokens",
        )
    limit = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
    if isinstance(limit, int) and checked.max_model_len > limit:
        raise ConfigError(
            f"the longest prompt with its response can have {wanted} tokens, and the model takes {limit}",
            field="sampling.max_new_tokens",
            fix="lower it, or lower prompts.max_tokens and leave out the longest prompts",
        )


def _check_engine(checked: Checked, model: Path) -> None:
    """What the engine would say only after it has started."""
    config = checked.config
    description = json.loads((model / "config.json").read_text())
    on_cpu, alone = configuration.runs_on_cpu(config), config.cluster.address is None
    config.engine.check(description, checked.max_model_len, on_cpu=on_cpu, alone=alone)


def _precision(config: RunConfig) -> list[str]:
    """What is worth knowing about the dtypes on this machine's CPU."""
    if config.engine.in_process or not configuration.runs_on_cpu(config) or hardware.computes_bfloat16():
        return []
    slow = [f"{name}.dtype" for name in ("engine", "learner") if getattr(config, name).dtype != "float32"]
    if slow:
        return [f"{' and '.join(slow)}: this CPU has no instructions for it; float32 (`auto`) is many times faster here"]
    return ["engine and learner compute in float32: this CPU has no instructions for bfloat16"]


def _check_room(checked: Checked) -> None:
    """Refuse a disk without room for the first checkpoint: a run would say so once it has sampled and trained."""
    least = int(checked.config.checkpoints.min_free_gib * 2**30)
    try:
        require_free(existing(checked.config.directory), checked.state_bytes, least)
    except StoreError as error:
        raise ConfigError(error.cause, field=error.field, fix=(error.fix or "").removesuffix(", then resume")) from None


def existing(directory: Path) -> Path:
    """The folder in which a directory is going to be, or the nearest one above that is there."""
    folder = directory.parent.absolute()
    while not os.path.exists(folder):  # Path.exists raises where a folder may not be looked into
        folder = folder.parent
    return folder


def check_writable(directory: Path) -> None:
    """Raises ConfigError where the directory of a run cannot be made."""
    folder = existing(directory)
    try:
        # A name of its own: of two runs that start at once, neither may take away the other's file.
        with tempfile.TemporaryFile(dir=folder, prefix=".onlinerl-write-test-") as probe:
            probe.write(b"0")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror}", field="runs", fix="choose another directory"
        ) from None


def check_model(model: str, field: str = "model") -> Path | None:
    """The model's directory, or None for a hub id that is not on this machine. Raises ConfigError if there is no model at a path."""
    path = hub.local(model)
    if path is not None:
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} holds no config.json", field=field, fix="give the directory of a Hugging Face model")
        return path
    if not hub.is_id(model):
        raise ConfigError(
            f"there is no directory {at_home(model, field).absolute()}",
            field=field,
            fix="correct the path (relative paths start where onlinerl was started); "
            + (
                "`onlinerl fetch-model` brings the quickstart's model"
                if "SmolLM2" in model
                else "a model on the hub is given by its id, such as org/name"
            ),
        )
    return None
