"""Sections that choose an implementation by its `name`: the other keys are the fields of its class, which refuses unknown ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from onlinerl import registry
from onlinerl.errors import ConfigError
from onlinerl.explain import explain, refused, together
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.component import Component
from onlinerl.protocols.engine import EngineConfig
from onlinerl.protocols.learner import LearnerConfig
from onlinerl.protocols.objective import Objective
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.protocols.prompts import PromptsConfig
from onlinerl.protocols.selection import Selector
from onlinerl.protocols.tracker import TrackerConfig
from onlinerl.protocols.transport import TransportConfig


class Role(NamedTuple):
    """What a section chooses from."""

    folder: str
    """Of onlinerl, with one file or folder for each implementation."""
    base: type[Component]
    default: str | None = None
    """Where the section gives no name."""
    keeps: frozenset[str] = frozenset()
    """Keys that every implementation has and that stay when another one is named."""


ROLES: dict[str, Role] = {
    "algorithm": Role("algorithms", Algorithm),
    "oracle": Role("oracles", Oracle),
    "pairing": Role("pairing", PairBuilder, "best_worst"),
    "engine": Role("engines", EngineConfig, "vllm", frozenset(EngineConfig.model_fields)),
    "learner": Role("learners", LearnerConfig, "deepspeed", frozenset(LearnerConfig.model_fields)),
    "prompts": Role("prompts", PromptsConfig, "jsonl", frozenset(PromptsConfig.model_fields)),
    "selection": Role("selection", Selector, "shuffled"),
    "sync": Role("transports", TransportConfig, "auto", frozenset(TransportConfig.model_fields)),
    "tracker": Role("trackers", TrackerConfig),
    "reward_model": Role("objectives", Objective, "bradley_terry"),
}
"""By section."""


def component(spec: Mapping[str, Any], section: str, role: str, base: type[Component]) -> Any:
    """Build the component a section describes: one key (`name`; `backend` of a transport) selects the class, the others are its fields.

    Raises:
        ConfigError: if the name or a key is unknown, or a value has the wrong type.
    """
    options, key = dict(spec), base.chosen_by
    name = options.pop(key, None)
    if name is None and (near := get_close_matches(key, options, n=1)):
        raise ConfigError("is not a known key", field=f"{section}.{near[0]}", fix=f"did you mean {key!r}?")
    name = ROLES[section].default if name is None and section in ROLES else name
    if not isinstance(name, str):
        raise ConfigError("is missing", field=f"{section}.{key}", fix=f"choose one of {', '.join(registry.names(role))}")
    cls = registry.load(role, name, base, f"{section}.{key}")
    if key in cls.model_fields:
        options[key] = name
    try:
        # JSON mode: YAML knows no tuples or enums, so strictness is that of JSON (no "1" for 1, lists for tuples allowed).
        return cls.model_validate_json(json.dumps(options, default=str))
    except ValidationError as error:
        raise together(explain(error, cls, f"{section}.")) from None


def build(spec: Mapping[str, Any], section: str) -> Any:
    """The component that a section describes.

    Raises:
        ConfigError: see `component`.
    """
    return component(spec, section, ROLES[section].folder, ROLES[section].base)


def chosen(section: str) -> Callable[[Any], Any]:
    """Turns what a section says into its component; what is no section is left for the type check."""

    def built(spec: Any) -> Any:
        if not isinstance(spec, Mapping):
            return spec
        try:
            return build(spec, section)
        except ConfigError as problem:
            raise refused(problem) from None

    return built


def default(section: str) -> Callable[[], Any]:
    """Makes the component of a section that is left out."""
    return lambda: build({}, section)
