"""YAML files and `key=value` overrides -> one tree of plain data."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from onlinerl.errors import ConfigError

Choices = Mapping[str, tuple[str | None, Collection[str]]]
"""Dotted keys that choose an implementation, whose section holds this implementation's keys only: by key, what is chosen where the
section says nothing, and the keys that all implementations have, which stay when another one is chosen."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as it is in YAML 1.2 and everywhere else (YAML 1.1 wants 1.0e-5), and a key comes once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ConfigError(
                        f"is given twice in {key.start_mark.name}, in lines {lines[key.value]} and {line}",
                        field=key.value,
                        fix="remove one of them",
                    )
                lines[key.value] = line
        return super().construct_mapping(node, deep)


_INT = "tag:yaml.org,2002:int"
# In YAML 1.1, 010 is 8 and 1:30 is 90, without a word. Here they are texts, which no number takes.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag != _INT]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path, choices: Choices, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree in a file, on top of those that it extends.

    Args:
        path: of the file.
        choices: see `Choices`.

    Raises:
        ConfigError: if there is no such file, or it is not what it should be.
    """
    if path.resolve() in _seen:
        raise ConfigError(f"{path} extends itself", field="extends", fix="break the circle")
    try:
        tree = _load(path.read_text(), str(path))
    except FileNotFoundError:
        raise _absent(path, extended=bool(_seen)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="CONFIG", fix="give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not valid YAML: {error}",
            field="CONFIG",
            fix="check brackets, quotes and indentation at that line and before it",
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} does not hold a mapping", field="CONFIG", fix="start with `name: my-run`")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path} extends {base!r}", field="extends", fix="give the path of one YAML file")
    return merge(read(path.parent / base, choices, (*_seen, path.resolve())), tree, choices)


def _absent(path: Path, *, extended: bool) -> ConfigError:
    """There is no file at `path`, which the user gave, or a file that is `extended`."""
    if path.name.startswith("-"):
        key = _bare(path.name.partition("=")[0])
        fix = f"write CONFIG first, then keys without dashes, e.g. {key}=VALUE"
        return ConfigError(f"there is no file {path}", field="CONFIG", fix=fix)
    near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1) if path.parent.is_dir() else []
    start = "at the file that says `extends`" if extended else "where onlinerl was started"
    fix = f"did you mean {path.parent / near[0]}?" if near else f"check the path; a relative one starts {start}"
    return ConfigError(f"there is no file {path.absolute()}", field="CONFIG", fix=fix)


def holder(path: Path, key: str) -> Path | None:
    """Which file has a dotted key: this one, or the nearest that it extends; None if none has. All of them can be read."""
    tree = node = _load(path.read_text(), str(path))
    *sections, leaf = key.split(".")
    for section in sections:
        node = node.get(section) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and leaf in node:
        return path
    base = tree.get("extends")
    return None if base is None else holder(path.parent / base, key)


def merge(base: dict[str, Any], over: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    """A tree on top of another one, which stays as it is."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            for leaf in value:
                if f"{key}.{leaf}" in choices:
                    old = _kept(old, f"{key}.{leaf}", value[leaf], choices)
            merged[key] = merge(dict(old), value, choices)
        else:
            merged[key] = value
    return merged


def nested(key: str, value: Any) -> dict[str, Any]:
    """A tree of one dotted key.

    >>> nested("training.batch_size", 8)
    {'training': {'batch_size': 8}}
    """
    for part in reversed(key.split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


def _load(text: str, where: str) -> Any:
    loader = _Loader(text)
    loader.name = where  # for messages
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _kept(section: Mapping[str, Any], key: str, name: Any, choices: Choices) -> dict[str, Any]:
    """What stays of a section when `key` chooses an implementation: all if it is the same, else what every one of them has."""
    default, common = choices.get(key, (None, ()))
    if key not in choices or name == section.get(key.rpartition(".")[2], default):
        return dict(section)
    return {k: v for k, v in section.items() if k in common}


def override(tree: dict[str, Any], text: str, choices: Choices) -> None:
    """Set one key of a tree from `key=value`, the value in YAML.

    Raises:
        ConfigError: if it is not of that form.
    """
    key, equals, value_text = text.partition("=")
    if key.startswith("-"):
        raise ConfigError(
            f"{text!r} is no option",
            field="override",
            fix=f"write keys without dashes, {_bare(key)}={value_text or 'VALUE'}; --help lists the options",
        )
    if not equals or not key:
        raise ConfigError(
            f"{text!r} is not of the form key=value", field="override", fix="write e.g. training.learning_rate=1e-5"
        )
    try:
        value = _load(value_text, text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{value_text!r} is not a YAML value: {error}", field=key, fix="quote it") from None
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{part!r} holds a value, not a section", field=key, fix="check the key")
        node = child
    if key in choices:
        kept = _kept(node, key, value, choices)
        node.clear()
        node.update(kept)
    node[leaf] = value


def _bare(option: str) -> str:
    """A key that was written like an option of other tools."""
    return option.lstrip("-").replace("-", "_")
