"""What identifies a run: the part of its configuration that a resume must not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from pydantic import BaseModel

from onlinerl import synonyms
from onlinerl.config.loading import SPECS, algorithm, foreign, oracle, resolved, spec_of
from onlinerl.config.roles import ROLES, build
from onlinerl.config.sections import RunConfig
from onlinerl.protocols.keys import MayChange
from onlinerl.protocols.oracle import Oracle


def without_unread(stored: RunConfig) -> RunConfig:
    """The configuration of a run without the pairing that an older version filled in whether or not anything read it."""
    return stored if algorithm(stored).needs.pairs else stored.model_copy(update={"pairing": None})


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that a resume must not change, flattened to dotted keys."""
    flat = flatten(resolved(config))
    free = resumable(config)
    return {k: v for k, v in flat.items() if not any(k == p or k.startswith(p + ".") for p in free)}


def resumable(config: RunConfig) -> list[str]:
    """The dotted keys that are marked as `Resumable`: where it runs, what is watched and when to stop, not what is computed."""
    inner = (marked(kind, f"{section}.", {}) for section, kind in _inner(oracle(config)).items())
    return [*marked(RunConfig, "", _classes(config)), *chain.from_iterable(inner)]


def _classes(config: RunConfig) -> dict[str, type[BaseModel]]:
    """The class of each section, of the implementation that it chooses where it chooses one."""
    chosen = {section: build(spec_of(config, section), section) for section in SPECS}
    sections = {name: value for name in RunConfig.model_fields if isinstance(value := getattr(config, name), BaseModel)}
    return {name: type(value) for name, value in {**sections, **chosen}.items()}


def _inner(asked: Oracle, section: str = "oracle") -> dict[str, type[Oracle]]:
    """The class of each oracle that this one asks, by its section, however deep it is."""
    found: dict[str, type[Oracle]] = {}
    for key, each in asked.inner().items():
        found |= {f"{section}.{key}": type(each), **_inner(each, f"{section}.{key}")}
    return found


def marked(model: type[BaseModel], prefix: str, classes: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """The dotted keys of a configuration that are marked as `Resumable`; `classes`: of its sections, by name."""
    for name, field in model.model_fields.items():
        inner = classes.get(prefix + name, field.annotation)
        if any(_is_marked(base, name) for base in model.__mro__):  # a class that only gives another default repeats no mark
            yield prefix + name
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from marked(inner, f"{prefix}{name}.", classes)


def _is_marked(model: type, name: str) -> bool:
    field = model.model_fields.get(name) if issubclass(model, BaseModel) else None
    return field is not None and any(isinstance(each, MayChange) for each in field.metadata)


def changes(stored: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """What differs between the fingerprint that a run was started with and a configuration, in words, by key.

    A key that the stored one lacks came with a later version: it counts as set to its default, or to what means the same as before.
    """
    now, defaults = fingerprint(config), flatten(_defaults(config))
    stored = {key if key in now else synonyms.RENAMED.get(key, key): value for key, value in stored.items()}
    if not algorithm(config).needs.pairs:  # an older version filled it in whether or not anything read it
        stored = {k: v for k, v in stored.items() if not k.startswith("pairing.")}
    for section in ("engine", "learner"):
        spec = {k.removeprefix(f"{section}."): v for k, v in stored.items() if k.startswith(f"{section}.")}
        unread = {f"{section}.{key}" for key in foreign(section, spec)}
        stored = {k: v for k, v in stored.items() if k not in unread}
    sections = {key.partition(".")[0] for key in stored}
    defaults |= {key: value for key, value in synonyms.EARLIER.items() if key.partition(".")[0] in sections}
    before = {**{k: _as_json(defaults[k]) for k in now.keys() - stored.keys() if k in defaults}, **stored}
    gone = {
        k: f"was {before[k]!r} when the run started, "
        + (f"and {absent} is now left out" if (absent := _left_out(k, now)) else "and this version has no such key")
        for k in before.keys() - now.keys()
        if before[k] is not None
        or not any(each.startswith(f"{k}.") for each in now)  # a section that is there now says so itself
    }
    differ = {
        k: f"was {before.get(k)!r} when the run started and is now {now[k]!r}"
        for k in now
        if k not in before or before[k] != _as_json(now[k])
    }
    return dict(sorted({**gone, **differ}.items()))


def _left_out(key: str, now: Mapping[str, Any]) -> str | None:
    """The section of a key, if it may be left out and is."""
    parents = (key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1))
    return next((section for section in parents if section in now and now[section] is None), None)


def _defaults(config: RunConfig) -> dict[str, Any]:
    """Every default of the sections and of the components that this configuration chooses."""
    chosen = {**_classes(config), **_inner(oracle(config))}
    found = _defaults_of(RunConfig) | {section: _defaults_of(each) for section, each in chosen.items()}
    for section, role in ROLES.items():  # what a class calls itself is no default: another one may have been chosen
        if role.base.chosen_by in found.get(section, {}):
            found[section] |= {role.base.chosen_by: role.default}
    return found


def _defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[name] = _defaults_of(kind)
        elif not field.is_required():
            found[name] = field.get_default(call_default_factory=True)
    return found


def _as_json(value: Any) -> Any:
    """As it is after it was stored."""
    return json.loads(json.dumps(value, default=str))


def digest(config: RunConfig) -> str:
    """Short hash of `fingerprint`."""
    return hashlib.sha256(json.dumps(fingerprint(config), sort_keys=True).encode()).hexdigest()[:16]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
