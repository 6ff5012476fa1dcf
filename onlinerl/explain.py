"""What pydantic finds wrong with a configuration, as field, cause and fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from onlinerl import synonyms
from onlinerl.errors import ConfigError, OnlineRLError
from onlinerl.protocols.component import Component

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
_BOUNDS = (
    ("ge", "from {}"),
    ("gt", "above {}"),
    ("le", "up to {}"),
    ("lt", "below {}"),
    ("max_length", "of at most {} characters"),
)

PROBLEM = "problem"
"""Key of what a validator has to say, among what pydantic keeps of an error."""


def explain(error: ValidationError, model: type[BaseModel], prefix: str, components: Sequence[str] = ()) -> list[OnlineRLError]:
    """All that is wrong, in the order of the fields.

    Args:
        error: of pydantic.
        model: what was validated.
        prefix: of its keys, e.g. `algorithm.`.
        components: keys of `model` that are sections with a `name` of their own.
    """
    found: list[OnlineRLError] = []
    for each in error.errors():
        inside = each.get("ctx", {}).get(PROBLEM)
        found += inside.one_by_one() if isinstance(inside, ConfigError) else [_explained(each, model, prefix, components)]
    return found


def refused(problem: ConfigError) -> PydanticCustomError:
    """What a validator raises of a section that is no good, so that the others are looked at all the same."""
    return PydanticCustomError("refused", "is refused", {PROBLEM: problem})


def together(problems: Sequence[OnlineRLError]) -> ConfigError:
    """One error that says all of them; the first is its field, cause and fix."""
    first, *others = problems
    return ConfigError(first.cause, field=first.field, fix=first.fix, also=others)


def _explained(found: ErrorDetails, model: type[BaseModel], prefix: str, components: Sequence[str]) -> ConfigError:
    """Field, cause and fix of one of pydantic's."""
    path = [str(part) for part in found["loc"]]
    field = prefix + ".".join(path)
    if found["type"] == "extra_forbidden":
        return _unknown(path, field, model)
    info = _field(model, path)
    if found["type"] == "missing" and info is not None and info.examples:
        return ConfigError("is missing", field=field, fix=f"write {field}={info.description}, e.g. {info.examples[0]}")
    if found["type"] == "missing":
        what = f" with {allowed(info)}" if info is not None and path[-1] not in components and allowed(info) else ""
        return ConfigError("is missing", field=field, fix=f"add `{path[-1]}: ...`{what}")
    cause = f"{found['msg'][0].lower()}{found['msg'][1:]}, got {found['input']!r}"
    return ConfigError(cause, field=field, fix=_fix(found["input"], field, info, path[-1] in components))


def _unknown(path: Sequence[str], field: str, model: type[BaseModel]) -> ConfigError:
    """A key that the section does not have."""
    known = _keys(model, path[:-1])
    if issubclass(model, Component) and len(path) == 1 and model.chosen_by not in known:
        known.append(model.chosen_by)
    now = synonyms.RENAMED.get(field)
    if now is not None and now.rpartition(".")[2] in known:
        return ConfigError("was renamed", field=field, fix=f"write {now}")
    if field in synonyms.MODIFIERS:
        cause = f"{synonyms.MODIFIERS[field]}; {model.__name__} is none of them"
        return ConfigError(cause, field=field, fix="leave it out, or choose another algorithm.name")
    return ConfigError("is not a known key", field=field, fix=_meant(path[-1], field, known, model))


def _meant(written: str, field: str, known: Sequence[str], model: type[BaseModel]) -> str:
    """What to write instead of an unknown key."""
    section = field.rpartition(".")[0]
    for key in (synonyms.key(field) or "").split(" or "):
        home, _, leaf = key.partition(",")[0].rpartition(".")
        if home == section and leaf in known:
            return f"did you mean {leaf!r}?"
        if key and home != section and home != "algorithm":
            return f"did you mean {key}?"
    plain = written.lower().replace("-", "_")
    homes = [f"{name}.{plain}" for name, info in model.model_fields.items() if not section and plain in _own(info)]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    close = [plain] if plain in known else get_close_matches(written, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"


def _fix(value: object, field: str, info: FieldInfo | None, component: bool) -> str:
    """What a value that is refused should be."""
    section = _section(info)
    if component or section is not None:
        key = section.chosen_by if section is not None and issubclass(section, Component) else "name"
        named = component or (section is not None and key in section.model_fields)
        if named and isinstance(value, str):
            return f"it is a section: write {field}.{key}={synonyms.name(value)}"
        return f"it is a section: write {field}.KEY=VALUE" + (
            f", KEY one of {', '.join(section.model_fields)}" if section else ""
        )
    if info is not None and info.examples:
        return f"write {info.description}, e.g. {info.examples[0]}"
    takes = allowed(info) if info is not None else ""
    return f"give {takes}" if takes else "correct the value"


def allowed(info: FieldInfo) -> str:
    """In words, what a field takes."""
    kinds, bounds = _described(info.annotation)
    bounds += _range(info.metadata)
    optional = "null" in kinds
    kinds = [kind for kind in kinds if kind != "null"]
    words = " ".join(filter(None, (" or ".join(kinds), " and ".join(bounds))))
    return f"{words}, or null" if kinds and optional else words if kinds else ""


def _described(annotation: Any) -> tuple[list[str], list[str]]:
    """Kinds of values, and bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kinds, bounds = _described(arguments[0])
        return kinds, bounds + _range(arguments[1:])
    if origin in (Union, UnionType):
        described = [_described(argument) for argument in arguments]
        return [kind for kinds, _ in described for kind in kinds], [bound for _, bounds in described for bound in bounds]
    if origin is Literal:
        return [f"one of {', '.join(map(str, arguments))}"], []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [f"a section of {', '.join(annotation.model_fields)}"], []
    if origin is dict:
        return ["a mapping, e.g. {name: 1}"], []
    if origin is list:
        kinds, bounds = _described(arguments[0])
        return [f"a list, each of it {' '.join([' or '.join(kinds), ' and '.join(bounds)]).strip()}"], []
    if origin is tuple and arguments and Ellipsis not in arguments:
        return [f"a list of {len(arguments)}, each of it {' or '.join(_described(arguments[0])[0])}"], []
    return [_KINDS[annotation]] if annotation in _KINDS else [], []


def _range(metadata: Iterable[Any]) -> list[str]:
    found = []
    for each in metadata:
        nested = getattr(each, "metadata", None)  # a Field inside Annotated keeps its bounds there
        if nested:
            found += _range(nested)
        found += [words.format(getattr(each, name)) for name, words in _BOUNDS if getattr(each, name, None) is not None]
    return found


def _field(model: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    """The field that a path leads to; of a value inside a mapping, the mapping."""
    info = None
    for part in path:
        if part not in model.model_fields:
            return info
        info = model.model_fields[part]
        inner = _section(info)
        if inner is None:
            return info
        model = inner
    return info


def _section(info: FieldInfo | None) -> type[BaseModel] | None:
    kind = info.annotation if info is not None else None
    if get_origin(kind) in (Union, UnionType):  # one that may be left out
        kind = next((each for each in get_args(kind) if each is not NoneType), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _own(info: FieldInfo) -> Sequence[str]:
    """The keys of a section."""
    section = _section(info)
    return list(section.model_fields) if section is not None else []


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        inner = _section(model.model_fields.get(part))
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)
