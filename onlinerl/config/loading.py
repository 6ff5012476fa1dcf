"""YAML plus dotted overrides -> one strict, typed, frozen configuration, and back.

`extends: other.yaml` takes another file as the base (paths relative to the file that says so). An unknown key is an error with a
suggestion; a value of the wrong type is an error that names the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from onlinerl import registry, yaml_files
from onlinerl.config.paths import at_home
from onlinerl.config.secrets import refuse_values
from onlinerl.config.sections import RunConfig
from onlinerl.errors import ConfigError
from onlinerl.explain import explain
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.component import Component
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.pairing import PairBuilder


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply `key=value` overrides.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    tree = yaml_files.read(Path(path), _CHOICES)
    # The choice of an implementation comes before its knobs, in whatever order they were typed.
    for override in sorted(overrides, key=lambda each: each.partition("=")[0] not in _CHOICES):
        yaml_files.override(tree, override, _CHOICES)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a configuration given as plain data, component sections included.

    Raises:
        ConfigError: naming the field, the cause and the fix.
    """
    refuse_values(tree, unknown_keys=True)
    try:
        # JSON mode: YAML knows no tuples or enums, so strictness is that of JSON (no "1" for 1, lists for tuples allowed).
        config = RunConfig.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise explain(error, RunConfig, "", [section for section, *_ in COMPONENTS]) from None
    for section, role, base in COMPONENTS:
        component(spec_of(config, section), section, role, base)
    refuse_values(tree)  # every key is known now, and one that is called a key holds one
    return config


def component(spec: Mapping[str, Any], section: str, role: str, base: type[Component]) -> Any:
    """Build the component a section describes: `name` selects the class, the other keys are its fields.

    Raises:
        ConfigError: if the name or a key is unknown, or a value has the wrong type.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name is None and (near := get_close_matches("name", options, n=1)):
        raise ConfigError("is not a known key", field=f"{section}.{near[0]}", fix="did you mean 'name'?")
    if not isinstance(name, str):
        raise ConfigError("is missing", field=f"{section}.name", fix=f"choose one of {', '.join(registry.names(role))}")
    cls: type[Component] = registry.load(role, name, base)
    try:
        return cls.model_validate_json(json.dumps(options, default=str))
    except ValidationError as error:
        raise explain(error, cls, f"{section}.") from None


def algorithm(config: RunConfig) -> Algorithm:
    """The configured algorithm."""
    return component(config.algorithm, "algorithm", "algorithms", Algorithm)


def oracle(config: RunConfig) -> Oracle:
    """The configured oracle."""
    return component(config.oracle, "oracle", "oracles", Oracle)


def pair_builder(config: RunConfig) -> PairBuilder:
    """The configured pair builder."""
    return component(spec_of(config, "pairing"), "pairing", "pairing", PairBuilder)


def spec_of(config: RunConfig, section: str) -> dict[str, Any]:
    """What a section says, or what it means where it is left out."""
    return getattr(config, section) or {"name": "best_worst"}


COMPONENTS: tuple[tuple[str, str, type[Component]], ...] = (
    ("algorithm", "algorithms", Algorithm),
    ("oracle", "oracles", Oracle),
    ("pairing", "pairing", PairBuilder),
)
"""(section, role, base class) of what is chosen by name."""
_CHOICES = {f"{section}.name" for section, *_ in COMPONENTS}


def located(config: RunConfig) -> RunConfig:
    """The same configuration with absolute paths, so that it means the same in every working directory."""
    model = at_home(config.model, "model")
    prompts = {
        key: path if path.startswith("package:") else str(at_home(path, f"prompts.{key}").absolute())
        for key, path in (("train", config.prompts.train), ("heldout", config.prompts.heldout))
    }
    return config.model_copy(
        update={
            "model": str(model.absolute()) if model.is_dir() else config.model,  # otherwise perhaps a hub id
            "runs": str(at_home(config.runs, "runs").absolute()),
            "prompts": config.prompts.model_copy(update=prompts),
        }
    )


def dump(config: RunConfig) -> str:
    """The whole configuration, defaults of every section and component included, as YAML that `load` reads back."""
    return yaml.safe_dump(resolved(config), sort_keys=False)


def resolved(config: RunConfig) -> dict[str, Any]:
    """The same with every default written out, as plain data."""
    tree = config.model_dump(mode="json")
    for section, role, base in COMPONENTS:
        spec = spec_of(config, section)
        tree[section] = {"name": spec["name"], **component(spec, section, role, base).model_dump(mode="json")}
    if config.pairing is None and not algorithm(config).needs.pairs:
        del tree["pairing"]
    return tree
