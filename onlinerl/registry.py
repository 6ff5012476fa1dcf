"""(role, name) -> implementation.

A name without a dot is a file of this package: `("algorithms", "dpo")` is `onlinerl/algorithms/dpo.py`. A name with a dot is a
dotted path to a class anywhere on the Python path. Other packages can add names through the entry-point group
`onlinerl.<role>`. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel

from onlinerl import synonyms, users_code
from onlinerl.errors import ConfigError, OnlineRLError

T = TypeVar("T")


def names(role: str) -> list[str]:
    """Names that can be selected for a role, without importing them."""
    package = importlib.import_module(f"onlinerl.{role}")
    own = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return sorted({*own, *(e.name for e in _entry_points(role))})


def load(role: str, name: str, base: type[T], field: str | None = None) -> type[T]:
    """The class that implements `name` for `role`; `field` is the key that names it, for messages.

    A module's implementation is the one class defined in it that subclasses `base`.

    Raises:
        ConfigError: if there is no such name, with close ones; or if what it names does not implement the role.
    """
    field = field or f"{role.removesuffix('s')}.name"
    if "." in name:
        return _checked(_dotted(name, field), name, base, field)
    for entry in _entry_points(role):
        if entry.name == name:
            return _checked(_dotted(entry.value.replace(":", ".").partition(" ")[0], field), entry.value, base, field)
    if name not in names(role):
        close = get_close_matches(synonyms.name(name), names(role), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"there is no {name!r}",
            field=field,
            fix=f"{hint}choose one of {', '.join(names(role))}, or give a dotted path to a class",
        )
    return _implementation(importlib.import_module(f"onlinerl.{role}.{name}"), base)


def _entry_points(role: str) -> metadata.EntryPoints:
    """What other packages add to a role."""
    return _group(f"onlinerl.{role}", tuple(sys.path))


@cache
def _group(group: str, path: tuple[str, ...]) -> metadata.EntryPoints:
    found: metadata.EntryPoints = _all_entry_points(path).select(group=group)
    return found


@cache
def _all_entry_points(path: tuple[str, ...]) -> Any:
    """Of all packages on the Python path: they are read from several hundred files."""
    return metadata.entry_points()


def _checked(found: object, where: str, base: type[T], field: str) -> type[T]:
    """What comes from outside the package implements its role, and declares what the role asks for."""
    role = f"{base.__module__}.{base.__name__}"
    if not (inspect.isclass(found) and issubclass(found, base) and found is not base):
        raise ConfigError(f"{where} is no subclass of {role}", field=field, fix="give the dotted path of one")
    if any("__init__" in vars(cls) for cls in found.__mro__[: found.__mro__.index(base)]):
        raise ConfigError(
            f"{where} has an `__init__`, and knobs are set from the configuration",
            field=field,
            fix="write knobs as fields (`word: str = 'good'`) and set other state in `open`: `_client: Any = PrivateAttr(None)`",
        )
    asked = [name for name in inspect.get_annotations(base) if name not in {*vars(base), *_fields(base)}]
    for name in asked:
        value = inspect.getattr_static(found, name, None)
        if value is None or inspect.isfunction(value):
            raise ConfigError(
                f"{where} does not declare `{name}`",
                field=field,
                fix=f"state it in the class, `{name} = ...`; {role} says what it means",
            )
    return found


def _fields(base: type) -> set[str]:
    return set(base.model_fields) if issubclass(base, BaseModel) else set()


def _implementation(module: ModuleType, base: type[T]) -> type[T]:
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    own = [c for c in classes if issubclass(c, base) and not c.__name__.startswith("_")]
    if len(own) != 1:
        raise TypeError(f"{module.__name__} must define exactly one implementation, found {[c.__name__ for c in own]}")
    return own[0]


def _dotted(path: str, field: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"{path!r} is no dotted path", field=field, fix="write PACKAGE.MODULE.CLASS, or a name without dots")
    module = imported(module_name, field)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(
            f"{module_name} has no {attribute!r}", field=field, fix="check the spelling of the dotted path"
        ) from error


def imported(module_name: str, field: str, error: type[OnlineRLError] = ConfigError) -> ModuleType:
    """A module of the user's own: a dotted name, or the path of a Python file.

    Raises:
        OnlineRLError: of type `error`, if it is not there or cannot be imported, with the lines that are to blame (see `users_code.on_import`).
    """
    try:
        return _from_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    # An import runs the user's code, which may raise anything, or read our command line and exit.
    except (Exception, SystemExit) as problem:
        said = users_code.said(problem)
        if isinstance(problem, ModuleNotFoundError) and problem.name and f"{module_name}.".startswith(f"{problem.name}."):
            fix = "put the package on the Python path, e.g. PYTHONPATH=. onlinerl ..., or correct the name"
            raise error(f"cannot import {module_name!r}: {said}", field=field, fix=fix) from None
        trace, fix = users_code.on_import(problem), "correct the error"
        if untyped := re.search(r"non-annotated attribute was detected: `(\w+) = (.*?)`", said):
            knob, value = untyped.groups()
            trace = f"`{knob} = {value}` has no type{users_code.line(problem)}"
            fix = f"write `{knob}: {_type_of(value)} = {value}` for a knob, `_{knob}: Any = PrivateAttr(None)` for other state"
        raise error(f"cannot import {module_name!r}: {trace}", field=field, fix=fix) from problem


def _from_file(path: str) -> ModuleType:
    """The module in a file. Its own folder is searched for what it imports, as if it had been started as a program."""
    file = Path(path).absolute()
    name = file.stem
    if (known := sys.modules.get(name)) is not None:
        if getattr(known, "__file__", None) == str(file):
            return known
        name = f"{name} in {file.parent}"  # another module has the plain name
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _type_of(value: str) -> str:
    try:
        return type(ast.literal_eval(value)).__name__
    except (ValueError, SyntaxError):
        return "..."
