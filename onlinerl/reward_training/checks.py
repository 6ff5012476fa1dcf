"""Everything that can be found wrong with the training of a reward model before the model is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from onlinerl import model_checks, preflight, weight_files
from onlinerl.config.reward_model import RewardConfig
from onlinerl.errors import ConfigError
from onlinerl.lora_checks import adapter_parameters
from onlinerl.model_checks import check_reward_model, check_vocabulary, check_weights
from onlinerl.preference_models import RewardHead
from onlinerl.prompts import _preferences
from onlinerl.prompts._preferences import Preferences
from onlinerl.protocols.keys import decided
from onlinerl.protocols.objective import Objective
from onlinerl.reward_training import refresh
from onlinerl.reward_training.comparisons import Fitting, Reader

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that has passed, with what was built on the way."""

    config: RewardConfig
    """With `model` as an absolute directory."""
    reader: Reader
    train: Fitting
    heldout: Fitting
    trained_before: bool
    """Whether the model is a reward model that is trained further."""
    state_bytes: int
    """Size of one checkpoint and of the export."""
    notes: list[str]
    """The derived numbers, and what was left out."""

    @property
    def objective(self) -> Objective:
        """What it is trained for."""
        return self.config.reward_model

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        training = self.config.training
        return ceil(len(self.train.comparisons) / training.batch_size) * training.epochs


def check(config: RewardConfig, data: Preferences | None = None) -> Checked:
    """Validate everything that does not need the model in memory.

    Args:
        config: of the training.
        data: what is trained and evaluated on; None: what `preferences` names.

    Raises:
        OnlineRLError: naming field, cause and fix.
    """
    decided(config.learner.dtype, "learner.dtype")
    _check_learner(config)
    preflight.check_writable(config.directory)
    local = preflight.check_model(config.model)
    if local is None:
        raise ConfigError(
            f"{config.model} is not on this machine", field="model", fix=f"download it first: hf download {config.model}"
        )
    config = config.model_copy(update={"model": str(local)})
    trained_before = check_kind(config, local)
    tokenizer = model_checks.tokenizer(config.model)
    if data is None:
        new = refresh.comparisons(config.preferences.runs, config.preferences.recency, config.model)
        data = _preferences.read(config.preferences, new)
    if (objection := config.reward_model.objections(data.train)) is not None:
        raise ConfigError(
            objection,
            field="reward_model.loss_type",
            fix="set it to plain, or say which column it is: preferences.columns.margin=COLUMN (or strength)",
        )
    reader = Reader(objective=config.reward_model, tokenizer=tokenizer, model=config.model)
    train, heldout = (Fitting.of(rows, reader, _longest(config, local)) for rows in (data.train, data.heldout))
    notes = [
        *data.remarks,
        *(_left_out(config, name, each) for name, each in (("train", train), ("heldout", heldout)) if each.left_out),
    ]
    for name, each in (("train", train), ("heldout", heldout)):
        if not each.comparisons:
            raise ConfigError(
                f"all {each.left_out} comparisons of preferences.{name} are longer than {config.preferences.max_length} tokens",
                field="preferences.max_length",
                fix="raise it, up to what the model takes",
            )
    check_vocabulary(local, tokenizer, [[max(train.highest, heldout.highest)]])
    parameters = weight_files.parameters(config.model, local)
    adapters = None if config.learner.lora is None else adapter_parameters(config.learner.lora, local)
    checked = Checked(
        config=config,
        reader=reader,
        train=train,
        heldout=heldout,
        trained_before=trained_before,
        state_bytes=_state_bytes(config, parameters, adapters),
        notes=notes,
    )
    begins = "goes on from a trained reward model" if trained_before else "begins with a new head"
    notes += [
        f"{len(train.comparisons):,} comparisons -> {checked.steps:,} optimizer steps of {config.training.batch_size} "
        f"({config.training.epochs} epoch{'s' if config.training.epochs > 1 else ''}); {len(heldout.comparisons):,} held out; {begins}",
        _memory(config, parameters, adapters),
    ]
    return checked


def _check_learner(config: RewardConfig) -> None:
    learner = config.learner
    if not learner.trains_rewards:
        raise ConfigError(f"{learner.name!r} trains no reward models", field="learner.name", fix="set it to torch or deepspeed")
    learner.check()
    if learner.lora is not None and not learner.adapts:
        raise ConfigError(
            f"is on, and the learner {learner.name!r} trains all weights", field="learner.lora", fix="leave it out"
        )
    if config.cluster.colocate:
        raise ConfigError(
            "there is no engine to share GPUs with",
            field="cluster.colocate",
            fix="leave it out where a reward model is trained",
        )


def check_kind(config: RewardConfig, local: Path) -> bool:
    """Whether the model is a reward model already; else it is a language model that can become one."""
    asked = config.reward_model.needs.reward_head
    assert asked is not None, "an objective says what is read at the last token"
    head = RewardHead(*asked)
    learner = config.learner
    found = check_reward_model(
        local, head.outputs, head.description, learner.attn_implementation, padding_free=learner.padding_free
    )
    check_weights(local)
    return found


def _longest(config: RewardConfig, local: Path) -> int:
    """The longest sequence that is trained.

    Raises:
        ConfigError: if the model does not take it.
    """
    limit = json.loads((local / "config.json").read_text()).get("max_position_embeddings")
    if isinstance(limit, int) and config.preferences.max_length > limit:
        raise ConfigError(
            f"is {config.preferences.max_length}, and the model takes {limit} tokens",
            field="preferences.max_length",
            fix=f"lower it to {limit}",
        )
    return config.preferences.max_length


def _left_out(config: RewardConfig, name: str, each: Fitting) -> str:
    total = each.left_out + len(each.comparisons)
    return f"preferences.{name}: left out: {each.left_out:,} of {total:,} longer than {config.preferences.max_length} tokens"


def _state_bytes(config: RewardConfig, parameters: float | None, adapters: float | None) -> int:
    weight = 4 if config.learner.dtype == "float32" else 2
    trained = parameters if adapters is None else adapters
    return int((trained or 0) * (12 + weight) + (parameters or 0) * weight)


def _memory(config: RewardConfig, parameters: float | None, adapters: float | None) -> str:
    if parameters is None:
        return "memory: the size of the model is not known, so nothing was estimated"
    more: dict[str, Any] = {} if adapters is None else {"adapters": adapters}
    parts = {k: v for k, v in config.learner.memory(parameters, **more).items() if k != "reference"}  # there is none
    ranks = config.learner.ranks
    of_what = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return (
        f"memory (estimate, {parameters / 1e9:.2f} B parameters): {ranks} rank{'s' if ranks > 1 else ''} x {sum(parts.values()) / GIB:.1f} "
        f"GiB ({config.learner.layout}: {of_what}; activations come on top)"
    )
