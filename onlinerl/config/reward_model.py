"""The configuration of `onlinerl train-rm`: a reward or preference model, trained on stored comparisons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError

from onlinerl import hardware, yaml_files
from onlinerl.config.identity import flatten, marked
from onlinerl.config.paths import at_home
from onlinerl.config.roles import ROLES, chosen, default
from onlinerl.config.secrets import refuse_values
from onlinerl.config.sections import ClusterConfig, Comparisons, Section, TrainingConfig, number_as_text
from onlinerl.errors import ConfigError
from onlinerl.explain import explain, together
from onlinerl.protocols.keys import Resumable
from onlinerl.protocols.learner import LearnerConfig
from onlinerl.protocols.objective import Objective

Column = Literal["prompt", "chosen", "rejected", "prob", "margin", "strength", "tie", "source"]
CHOICES = {
    f"{section}.{ROLES[section].base.chosen_by}": (ROLES[section].default, ROLES[section].keeps)
    for section in ("reward_model", "learner")
}


class PreferencesConfig(Comparisons):
    """Comparisons to train on, as they are published."""

    train: str
    """A file of JSON lines, JSON, Parquet or CSV, a folder of `save_to_disk`, or a dataset of the hub, with `chosen` and `rejected`."""
    heldout: str | None = None
    """The same, to evaluate on. By default some of the prompts of `train` are held out."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """How many, where there is no `heldout`. Which they are depends on the prompts alone, so they stay held out when data are added."""
    train_split: str = "train"
    """Name of a split, or a part of one, e.g. `train[:90%]`. A file has one split, `train`."""
    heldout_split: str | None = None
    """As `train_split`. By default `test`, and `train` for a file."""
    runs: list[str] = Field(default_factory=list)
    """Directories of runs whose labels are trained on, too: every pair of responses that the oracle has compared or scored, as probable as it
    said. Their prompts are held out as those of `train` are."""
    recency: float = Field(0.5, gt=0, le=1)
    """A label of a run counts this to the power of its age, in iterations before the run's newest."""
    max_accuracy_drop: float = Field(0.02, ge=0)
    """A reward model that is trained further, and whose accuracy on what is held out falls by more than this, and not by chance, is rejected."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """Which column is what, where it has another name, e.g. `{chosen: answer_a, margin: score_gap}`."""
    max_length: int = Field(1024, ge=1)
    """Longest sequence in tokens. Comparisons with a longer one are left out and counted; nothing is ever cut."""


class RewardTraining(TrainingConfig):
    """How the learner steps."""

    batch_size: int = Field(64, ge=1)
    """Comparisons per optimizer step, over all ranks."""
    epochs: int = Field(1, ge=1)
    """Passes over the comparisons. Reward models overfit in the second one."""
    learning_rate: float = Field(5e-6, gt=0, le=1)
    """At its peak. The default suits all weights of a model of 7B; adapters need about 1e-4, a model of 135M 2e-5."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""


OF_A_LOOP = {
    *("target_kl", "iteration_decay", "optimizer_state", "online_merging", "max_idle_iterations", "on_truncated"),
    *("sample_weights", "sample_weight_clip", "sample_age_decay", "aux_loss_coef"),
}
"""Keys of `training` that say something about iterations or a policy."""


class RewardCheckpoints(Section):
    """What is kept on disk."""

    every: Resumable[int] = Field(100, ge=1)
    """Optimizer steps between checkpoints: what a kill costs at most."""
    keep: Resumable[int] = Field(2, ge=1)
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    min_free_gib: Resumable[float] = Field(1.0, ge=0, le=1e9)
    """Refuse to write a checkpoint that would leave less than this free."""


class RewardConfig(Section):
    """A reward or preference model."""

    name: Annotated[str, BeforeValidator(number_as_text)] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="at most 100 letters, digits, dots, - and _, a letter or digit first",
        examples=["my-reward-model"],
    )
    """It is kept in `<runs>/<name>`."""
    model: str
    """Directory or hub id of the language model to begin with, or of a reward model of the same objective, which is trained further."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the first weights of the head and the order of training."""
    runs: Resumable[str] = "reward_models"
    """Folder of the results."""
    reward_model: Annotated[SerializeAsAny[Objective], BeforeValidator(chosen("reward_model"))] = Field(
        default_factory=default("reward_model")
    )
    """`objective` and its knobs: the fields of its class in onlinerl/objectives, or of a class of your own; bradley_terry by default."""
    preferences: PreferencesConfig
    training: RewardTraining = RewardTraining()
    learner: Annotated[SerializeAsAny[LearnerConfig], BeforeValidator(chosen("learner"))] = Field(
        default_factory=default("learner")
    )
    """`name` and the keys of that learner. A single rank on this machine trains in this process; several, or any on a cluster, run on Ray."""
    checkpoints: RewardCheckpoints = RewardCheckpoints()
    cluster: Resumable[ClusterConfig] = ClusterConfig()

    @property
    def directory(self) -> Path:
        """Where everything about it is kept."""
        return at_home(self.runs, "runs") / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> RewardConfig:
    """Read a configuration file and apply `key=value` overrides.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    tree = yaml_files.read(Path(path), CHOICES)
    for override in sorted(overrides, key=lambda each: each.partition("=")[0] not in CHOICES):
        yaml_files.override(tree, override, CHOICES)
    refuse_values(tree, unknown_keys=True)
    if "algorithm" in tree or "iterations" in tree:
        raise ConfigError(
            f"{path} is the configuration of a run",
            field="CONFIG",
            fix=f"start it with `onlinerl run {path}`; configs/reward_models/hh.yaml trains a reward model",
        )
    if isinstance(training := tree.get("training"), dict) and (unread := sorted(OF_A_LOOP & training.keys())):
        raise ConfigError(
            "belongs to the iterations of a run, and a reward model has none", field=f"training.{unread[0]}", fix="leave it out"
        )
    try:
        return settled(RewardConfig.model_validate_json(json.dumps(tree, default=str)))
    except ValidationError as error:
        raise together(explain(error, RewardConfig, "")) from None


def settled(config: RewardConfig) -> RewardConfig:
    """With absolute paths and the dtype decided, so that it means the same in every working directory and on every machine."""
    found: dict[str, Any] = {"runs": str(at_home(config.runs, "runs").absolute())}
    model = at_home(config.model, "model")
    if model.is_dir():
        found["model"] = str(model.absolute())
    data = config.preferences
    there = {w: at_home(p, f"preferences.{w}") for w, p in (("train", data.train), ("heldout", data.heldout)) if p is not None}
    runs = [str(at_home(run, "preferences.runs").absolute()) for run in data.runs]
    found["preferences"] = data.model_copy(
        update={"runs": runs, **{w: str(path.absolute()) for w, path in there.items() if path.exists()}}
    )
    if config.learner.dtype == "auto":
        low = not on_cpu(config) or hardware.computes_bfloat16()
        found["learner"] = config.learner.model_copy(update={"dtype": "bfloat16" if low else "float32"})
    return config.model_copy(update=found)


def on_cpu(config: RewardConfig) -> bool:
    """Whether it is known already that it trains on a CPU."""
    device, alone = config.cluster.device, config.cluster.address is None
    return device == "cpu" or (device == "auto" and alone and not hardware.has_gpu())


def dump(config: RewardConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    tree = config.model_dump(mode="json")
    tree["reward_model"] = {"objective": objective_name(config), **tree["reward_model"]}
    tree["training"] = {key: value for key, value in tree["training"].items() if key not in OF_A_LOOP}
    return yaml.safe_dump(tree, sort_keys=False)


def objective_name(config: RewardConfig) -> str:
    """As it is chosen: the name of its file, or the dotted path of a class elsewhere."""
    kind = type(config.reward_model)
    folder = f"onlinerl.{ROLES['reward_model'].folder}."
    return (
        kind.__module__.removeprefix(folder) if kind.__module__.startswith(folder) else f"{kind.__module__}.{kind.__qualname__}"
    )


def fingerprint(config: RewardConfig) -> dict[str, Any]:
    """The part of a configuration that a resume must not change, flattened to dotted keys."""
    flat = flatten(yaml.safe_load(dump(config)))
    classes = {name: type(value) for name in RewardConfig.model_fields if isinstance(value := getattr(config, name), BaseModel)}
    free = list(marked(RewardConfig, "", classes))
    return {k: v for k, v in flat.items() if not any(k == p or k.startswith(p + ".") for p in free)}


def digest(config: RewardConfig) -> str:
    """Short hash of `fingerprint`."""
    return hashlib.sha256(json.dumps(fingerprint(config), sort_keys=True).encode()).hexdigest()[:16]
