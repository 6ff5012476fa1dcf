"""A sweep file -> the configurations of its runs.

    base: ../quickstart.yaml          # the run configuration that all of them extend
    name: quickstart-all              # the runs are RUNS/NAME/COMBINATION
    set: {iterations: 2}              # what differs from the base in all of them; dotted keys or sections
    axes:                             # every combination of these is a run
      algorithm: [dpo, {name: simpo, beta: 2.0}]
      seed: [0, 1]
    exclude: [{algorithm: simpo, seed: 1}]
    token_budget: 200000              # instead of `iterations`
    exclude_refused: false            # true: what `check` refuses is left out, with the reason, instead of refusing all

`base` is relative to the sweep file, all other paths to where onlinerl is started.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onlinerl import config as configuration
from onlinerl import registry, yaml_files
from onlinerl.config import RunConfig
from onlinerl.config.loading import CHOICES
from onlinerl.config.roles import ROLES
from onlinerl.errors import ConfigError, OnlineRLError
from onlinerl.explain import explain, together

NAMED = frozenset(key.partition(".")[0] for key in CHOICES if key.endswith(".name"))
"""Sections that choose by name: a text in their place is that name."""
OWN = frozenset({"name", "runs"})
"""Keys of a run that the sweep itself sets."""
LONGEST = 100
"""Characters of a run's name."""


class SweepFile(BaseModel):
    """What a sweep file says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: str = Field(description="the path of a run configuration, relative to this file", examples=["../quickstart.yaml"])
    """The run configuration that every run extends."""
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="at most 100 letters, digits, dots, - and _, a letter or digit first",
        examples=["my-sweep"],
    )
    """The folder of its runs, in the base's `runs`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys that all runs have, instead of those of the base."""
    axes: dict[str, Annotated[list[Any], Field(min_length=1)] | Literal["all"]] = Field(min_length=1)
    """By key: the values that it takes. A section that chooses by name takes a name, or a mapping with the name and its knobs; `all`
    instead of a list is every name that there is, with the defaults of each."""
    exclude: list[dict[str, Any]] = Field(default_factory=list)
    """Combinations that are left out: all that have these values on these axes."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens that a run may sample to train on: prompts x `sampling.samples_per_prompt` x `sampling.max_new_tokens` an iteration. Each run gets as
    many iterations as stay within it even if every response is that long; then `iterations` is not read. An algorithm that samples more to each
    prompt (the base model, a mixture, a greedy response) gets as many iterations with fewer prompts. Not counted are what dynamic sampling draws
    anew and answers to held-out prompts."""
    exclude_refused: bool = False
    """Leave out what `check` refuses, and say why, instead of refusing the whole sweep."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One run of a sweep."""

    name: str
    choices: Mapping[str, str]
    """By axis: its value in words."""
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file with everything in it resolved."""

    name: str
    file: Path
    folder: Path
    exclude_refused: bool
    combinations: Sequence[Combination]
    """In the order of the file: the last axis changes fastest."""


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        path: of the file.
        overrides: `key=value`, on top of what it sets for all runs.

    Raises:
        ConfigError: naming the field, the cause and the fix; of combinations that are no configuration, all at once.
    """
    tree = yaml_files.read(path, {})
    try:
        file = SweepFile.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise together(explain(error, SweepFile, "")) from None
    common: dict[str, Any] = {}
    for key, value in file.set.items():
        common = yaml_files.merge(common, yaml_files.nested(key, value), {})
    for override in overrides:
        yaml_files.override(common, override, {})
    _require_apart(file, common)
    base = yaml_files.read(path.parent / file.base, CHOICES)
    folder = _folder(base, common) / file.name
    if (folder / "manifest.json").exists():
        raise ConfigError(f"is {file.name!r}, and {folder} is a run", field="name", fix="give the sweep a name of its own")
    found: list[Combination] = []
    wrong: dict[str, ConfigError] = {}
    for name, choices, values in _combinations(file):
        try:
            found.append(Combination(name=name, choices=choices, config=_config(file, base, common, values, folder, name)))
        except ConfigError as error:
            wrong[name] = error
    if wrong:
        raise all_at_once(wrong, len(wrong) + len(found))
    return Sweep(name=file.name, file=path, folder=folder, exclude_refused=file.exclude_refused, combinations=found)


def all_at_once(wrong: Mapping[str, OnlineRLError], of: int) -> ConfigError:
    """One error for what is wrong with several of `of` combinations; those with the same fault are named together."""
    same: dict[str, list[str]] = {}
    for name, error in wrong.items():
        for each in error.one_by_one():
            same.setdefault(str(each), []).append(name)
    lines = ["\n" + ", ".join(names) + ":\n    " + text.replace("\n", "\n    ") for text, names in same.items()]
    return ConfigError(
        f"{len(wrong)} of {of} combinations cannot run" + "".join(lines),
        field="axes",
        fix="correct these values, leave the combinations out with `exclude`, or all that `check` refuses with "
        "`exclude_refused: true`",
    )


def _require_apart(file: SweepFile, common: Mapping[str, Any]) -> None:
    """Each key is set in one place."""
    flat = configuration.flatten(common)
    for key in (*file.axes, *flat):
        if key == "name" or (key == "runs" and key in file.axes):
            raise ConfigError("is what the sweep calls its runs", field=key, fix="remove it; the name of the sweep is `name`")
    for axis in file.axes:
        if axis in flat or (axis in NAMED and f"{axis}.name" in flat):
            raise ConfigError("is an axis of the sweep, and set for all runs too", field=axis, fix="remove one of the two")
    if file.token_budget is not None and "iterations" in {*file.axes, *flat}:
        raise ConfigError("follows from token_budget", field="iterations", fix="remove one of the two")


def _folder(base: Mapping[str, Any], common: Mapping[str, Any]) -> Path:
    default = RunConfig.model_fields["runs"].default
    return configuration.at_home(str(common.get("runs", base.get("runs", default))), "runs").absolute()


def _combinations(file: SweepFile) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Name, value in words and value by axis, of every combination that is not excluded.

    Raises:
        ConfigError: if two have the same name, if an exclusion fits none, or if none is left.
    """
    axes = {axis: _every(axis) if values == "all" else values for axis, values in file.axes.items()}
    for axis, values in axes.items():
        words = [label(axis, value) for value in values]
        if twice := [word for word in words if words.count(word) > 1]:
            raise ConfigError(
                f"has two values that would give their runs the same name, {twice[0]!r}", field=f"axes.{axis}", fix="change one"
            )
    fits = [0] * len(file.exclude)
    left = 0
    for chosen in product(*axes.values()):
        choice = dict(zip(axes, chosen, strict=True))
        excluding = [i for i, rule in enumerate(file.exclude) if _fits(rule, choice)]
        for i in excluding:
            fits[i] += 1
        if excluding:
            continue
        left += 1
        choices = {axis: label(axis, value) for axis, value in choice.items()}
        yield _named(choices), choices, choice
    for i, rule in enumerate(file.exclude):
        unknown = [axis for axis in rule if axis not in file.axes]
        if unknown or not fits[i]:
            raise ConfigError(
                f"{rule} fits no combination" + (f": {unknown[0]} is no axis" if unknown else ""),
                field=f"exclude.{i}",
                fix=f"name values of {', '.join(file.axes)}, or remove it",
            )
    if not left:
        raise ConfigError("leaves no combination", field="exclude", fix="remove one of them")


def _every(axis: str) -> list[Any]:
    if axis not in NAMED:
        raise ConfigError("is no section that chooses by name", field=f"axes.{axis}", fix="list its values")
    return list(registry.names(ROLES[axis].folder))


def _fits(rule: Mapping[str, Any], choice: Mapping[str, Any]) -> bool:
    def same(asked: Any, value: Any) -> bool:
        return bool(asked == value or (isinstance(value, Mapping) and asked == value.get("name")))

    return all(axis in choice and same(asked, choice[axis]) for axis, asked in rule.items())


def label(axis: str, value: Any) -> str:
    """A value of an axis as a part of a run's name: `dpo`, `simpo-beta2.0`, `seed0`.

    >>> label("algorithm", {"name": "simpo", "beta": 2.0}), label("training.learning_rate", 1e-5), label("pairing", None)
    ('simpo-beta2.0', 'learning_rate1e-05', 'pairing-none')
    """
    leaf = axis.rpartition(".")[2]
    if isinstance(value, Mapping):
        knobs = [f"{key}{_plain(knob)}" for key, knob in configuration.flatten(value).items() if key != "name"]
        return "-".join([_plain(value.get("name", leaf)), *knobs])
    if value is None:
        return f"{leaf}-none"
    return _plain(value) if axis in NAMED else f"{leaf}{_plain(value)}"


def _named(choices: Mapping[str, str]) -> str:
    """The name of a run that has these values: all of them, or as much as a name has room for, and a hash of the rest."""
    name = "-".join(choices.values())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plain(value: Any) -> str:
    """In characters that the name of a run may have."""
    text = json.dumps(value) if isinstance(value, bool | list) else str(value)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    return plain if isinstance(value, int | float) else plain.strip("-")


def _config(
    file: SweepFile, base: dict[str, Any], common: Mapping[str, Any], values: Mapping[str, Any], folder: Path, name: str
) -> RunConfig:
    """The configuration of one run, as a file that extends the base would give it.

    Raises:
        ConfigError: if it is none.
    """
    over: dict[str, Any] = {}
    for axis, value in sorted(values.items(), key=lambda one: one[0].count(".")):  # a section before its keys
        over = yaml_files.merge(over, yaml_files.nested(axis, _section(axis, value)), CHOICES)
    # What the axes choose comes before what is set for all, which may be a knob of it, and then has the last word.
    tree = yaml_files.merge(yaml_files.merge(yaml_files.merge(base, over, CHOICES), common, CHOICES), over, CHOICES)
    if file.token_budget is not None:
        tree["iterations"] = 1
    tree |= {"name": name, "runs": str(folder)}
    config = configuration.parse(tree)
    if file.token_budget is None:
        return config
    return _within(file.token_budget, config)


def sampled_beside(config: RunConfig) -> int:
    """How many responses to each prompt an algorithm has sampled beside those that `sampling.samples_per_prompt` counts."""
    sources = configuration.algorithm(config).needs.beside_samples
    return len(sources) - sources.count("teacher") - sources.count("carried")


def _within(budget: int, config: RunConfig) -> RunConfig:
    """With as many iterations, and where the algorithm samples more than others as many prompts, as stay within the budget.

    Raises:
        ConfigError: if not one does.
    """
    prompts, samples, tokens = config.prompts, config.sampling.samples_per_prompt, config.sampling.max_new_tokens
    most = prompts.per_iteration * samples * tokens
    if most > budget:
        raise ConfigError(
            f"is {budget}, and one iteration may sample {most} tokens: {prompts.per_iteration} prompts x {samples} samples x {tokens} tokens",
            field="token_budget",
            fix=f"set it to {most} or more, or lower prompts.per_iteration",
        )
    iterations = budget // most
    beside = sampled_beside(config)
    fewer = budget // (iterations * (samples + beside) * tokens)
    if fewer < 1:
        raise ConfigError(
            f"is {budget}, and {config.algorithm['name']} samples {samples + beside} responses to a prompt: not one prompt an iteration is within it",
            field="token_budget",
            fix=f"set it to {iterations * (samples + beside) * tokens} or more",
        )
    if fewer < prompts.per_iteration:
        prompts = prompts.model_copy(update={"per_iteration": fewer})
    return config.model_copy(update={"iterations": iterations, "prompts": prompts})


def _section(axis: str, value: Any) -> Any:
    return {"name": value} if axis in NAMED and isinstance(value, str) else value
