"""YAML plus dotted overrides -> one strict, typed, frozen configuration, and back.

`extends: other.yaml` takes another file as the base (paths relative to the file that says so). An unknown key is an error with a
suggestion; a value of the wrong type is an error that names the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from onlinerl import registry, synonyms, yaml_files
from onlinerl.config.roles import ROLES, build
from onlinerl.config.secrets import refuse_values
from onlinerl.config.sections import RunConfig
from onlinerl.errors import ConfigError, OnlineRLError
from onlinerl.explain import explain, together
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.pairing import PairBuilder


def load(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> RunConfig:
    """Read a configuration file and apply `key=value` overrides. `stored`: the file is that of a run, perhaps of an older version.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    tree = yaml_files.read(Path(path), CHOICES)
    if stored:
        tree = _as_now(tree)
    if "preferences" in tree and "algorithm" not in tree:
        fix = f"train it with `onlinerl train-rm {path}`, and give the result to a run: oracle.path=..."
        raise ConfigError(f"{path} is the configuration of a reward model", field="CONFIG", fix=fix)
    # The choice of an implementation comes before its knobs, in whatever order they were typed.
    for override in sorted(overrides, key=lambda each: each.partition("=")[0] not in CHOICES):
        yaml_files.override(tree, override, CHOICES)
    try:
        return located(parse(tree), [Path(), Path(path).parent])
    except ConfigError as error:
        if error.field not in synonyms.RENAMED or (file := yaml_files.holder(Path(path), error.field)) is None:
            raise
        raise ConfigError(error.cause, field=error.field, fix=f"{error.fix}, in {file}", also=error.also) from None


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a configuration given as plain data, component sections included.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    refuse_values(tree, unknown_keys=True)
    problems: list[OnlineRLError] = []
    try:
        # JSON mode: YAML knows no tuples or enums, so strictness is that of JSON (no "1" for 1, lists for tuples allowed).
        config = RunConfig.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        problems = explain(error, RunConfig, "", SPECS)
    problems += _refused(tree)
    if problems:
        raise together(problems)
    pair_builder(config)
    refuse_values(tree)  # every key is known now, and one that is called a key holds one
    return config


def _refused(tree: Mapping[str, Any]) -> list[OnlineRLError]:
    """What is wrong with components that are built where they are needed. Of which kind pairing is, its algorithm may decide."""
    problems: list[OnlineRLError] = []
    for section in SPECS:
        spec = tree.get(section)
        try:
            if isinstance(spec, Mapping) and (section != "pairing" or "name" in spec):
                build(spec, section)
        except ConfigError as error:
            problems += error.one_by_one()
    return problems


def located(config: RunConfig, folders: Sequence[Path]) -> RunConfig:
    """The same with absolute paths of files that the oracle names, if they are in one of these folders."""
    written = oracle(config)
    found = written.located(folders)
    before, after = written.model_dump(mode="json"), found.model_dump(mode="json")
    changed = {key: value for key, value in after.items() if value != before[key]}
    return config.model_copy(update={"oracle": {**config.oracle, **changed}}) if changed else config


def _as_now(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version stored, in today's keys."""
    now = dict(tree)
    for section in ("engine", "learner"):
        if unread := foreign(section, now.get(section)):
            now[section] = {key: value for key, value in now[section].items() if key not in unread}
    for old, new in synonyms.RENAMED.items():
        section, _, key = old.partition(".")
        values = now.get(section)
        if isinstance(values, Mapping) and key in values and key not in _class_of(section, values).model_fields:
            now[section] = {new.partition(".")[2] if k == key else k: value for k, value in values.items()}
    for key, before in synonyms.EARLIER.items():
        section, _, leaf = key.partition(".")
        if isinstance(values := now.get(section), Mapping):
            now[section] = {**values, leaf: values.get(leaf, before)}
    return now


def _class_of(section: str, values: Mapping[str, Any]) -> type[BaseModel]:
    """What reads a section."""
    if section not in ROLES:
        kind = RunConfig.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        return kind
    role = ROLES[section]
    key = role.base.chosen_by
    return registry.load(role.folder, str(values.get(key, role.default)), role.base, f"{section}.{key}")


def foreign(section: str, spec: Any) -> list[str]:
    """Keys of another implementation: an older version filled in those of its default one, whichever was chosen."""
    if not isinstance(spec, Mapping):
        return []
    of_default, own = _class_of(section, {}), _class_of(section, spec)
    return [key for key in spec if key in of_default.model_fields and key not in own.model_fields]


def algorithm(config: RunConfig) -> Algorithm:
    """The configured algorithm."""
    built: Algorithm = build(config.algorithm, "algorithm")
    return built


def oracle(config: RunConfig) -> Oracle:
    """The configured oracle, in a run of this policy."""
    built: Oracle = build(config.oracle, "oracle")
    return built.of_policy(config.model)


def pair_builder(config: RunConfig) -> PairBuilder:
    """The configured pair builder."""
    built: PairBuilder = build(spec_of(config, "pairing"), "pairing")
    return built


def spec_of(config: RunConfig, section: str) -> dict[str, Any]:
    """What a section says, or what it means where it is left out."""
    spec: dict[str, Any] = getattr(config, section) or {}
    wanted = algorithm(config).needs.pairing if section == "pairing" and "name" not in spec else None
    return spec if wanted is None else {"name": wanted, **spec}


SPECS = ("algorithm", "oracle", "pairing")
"""Sections that are kept as they are written; the component is built where it is needed."""
CHOICES = {
    f"{section}.{role.base.chosen_by}": (role.default, role.keeps)
    for section, role in ROLES.items()
    if section not in ("tracker", "reward_model")
}


def dump(config: RunConfig) -> str:
    """The whole configuration, defaults of every section and component included, as YAML that `load` reads back."""
    return yaml.safe_dump(resolved(config), sort_keys=False)


def resolved(config: RunConfig) -> dict[str, Any]:
    """The same with every default written out, as plain data."""
    tree = config.model_dump(mode="json")
    for section in SPECS:
        spec = spec_of(config, section)
        tree[section] = {"name": spec.get("name", ROLES[section].default), **build(spec, section).model_dump(mode="json")}
    if config.pairing is None and not algorithm(config).needs.pairs:
        del tree["pairing"]
    return tree
