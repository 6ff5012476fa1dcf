"""What is known of each algorithm, from its own declarations: a card each."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from onlinerl import registry
from onlinerl.explain import allowed
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.needs import Needs

OFF_POLICY = {
    "valid": "responses of an older policy (schedule.max_lag) are as good as new ones",
    "corrected": "responses of an older policy (schedule.max_lag) are weighed for it",
    "approximate": "responses of an older policy (schedule.max_lag) are taken as they are, which is near enough",
    "refused": "responses of an older policy (schedule.max_lag) would be wrong, and are refused",
}
_INDENT = "    "
_DEPARTURE = re.compile(
    r"Not the paper's: `(?P<knob>\w+)`, (?P<value>\S+) (?:there|in its (?:code|script))(?: \([^)]*\))?; (?P<why>[^;]+?[.](?= [A-Z`]|$))"
)
"""What the docstring of an algorithm says of a knob whose default is another one than its paper's: the paper's value, and why."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One key of `algorithm`."""

    name: str
    default: Any
    takes: str
    """In words, which values."""
    about: str
    paper: str | None = None
    """The value of the paper, as it is written in a configuration, where the default is known to be another one."""
    why: str | None = None
    """Then the reason."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An algorithm as it is by default."""

    name: str
    source: str
    """The paper."""
    about: str
    """What it optimizes."""
    unit: str
    """What the loss is a mean over."""
    needs: tuple[str, ...]
    reference: str
    """The schedule of its paper."""
    off_policy: str
    loss_at_reference: float | None
    knobs: tuple[Knob, ...]

    @property
    def departures(self) -> tuple[Knob, ...]:
        """Knobs whose defaults are not the paper's."""
        return tuple(knob for knob in self.knobs if knob.paper is not None)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def card(name: str) -> Card:
    """Of one algorithm.

    Args:
        name: as in `algorithm.name`.

    Raises:
        ConfigError: if there is none of this name.
    """
    kind = registry.load("algorithms", name, Algorithm)
    algorithm, docs = kind(), _docs(kind)
    defaults, elsewhere = algorithm.model_dump(), departures(_plain(kind.__doc__))
    if unknown := elsewhere.keys() - defaults.keys():
        raise ValueError(
            f"the docstring of {kind.__name__} says of {', '.join(sorted(unknown))} what the paper has, which is no knob"
        )
    return Card(
        name=name,
        source=_plain(sys.modules[kind.__module__].__doc__),
        about=_plain(kind.__doc__),
        unit=algorithm.unit,
        needs=tuple(_needs(algorithm.needs)),
        reference=algorithm.reference,
        off_policy=OFF_POLICY[algorithm.needs.off_policy],
        loss_at_reference=algorithm.loss_at_reference,
        knobs=tuple(
            Knob(
                name=field, default=defaults[field], takes=allowed(info), about=docs.get(field, ""), **elsewhere.get(field, {})
            )
            for field, info in kind.model_fields.items()
        ),
    )


def departures(about: str) -> dict[str, dict[str, str]]:
    """By knob, the value of the paper and why it is not the default, from what an algorithm says of itself: "Not the paper's: `beta`, 0.01
    there; ...".

    Raises:
        ValueError: if something of that kind is said in another form.
    """
    found = {one["knob"]: {"paper": one["value"], "why": one["why"]} for one in _DEPARTURE.finditer(about)}
    if len(found) != about.count("Not the paper's"):
        raise ValueError(f"write: Not the paper's: `knob`, VALUE there; reason. {about!r}")
    return found


def cards() -> list[Card]:
    """Of all algorithms, by their names."""
    return [card(name) for name in registry.names("algorithms")]


def table(all_of_them: Sequence[Card]) -> Iterator[str]:
    """A line each."""
    width = max(len(one.name) for one in all_of_them)
    for one in all_of_them:
        yield f"{one.name:<{width}}  {one.source}"


def page(one: Card, width: int = 100) -> Iterator[str]:
    """A card as text."""
    yield f"{one.name}: {one.source}"
    yield ""
    yield from textwrap.wrap(one.about, width)
    yield ""
    yield f"mean over: {one.unit}s"
    yield f"reference.schedule: {one.reference}"
    for need in one.needs:
        yield from textwrap.wrap(f"needs: {need}", width, subsequent_indent=_INDENT)
    yield one.off_policy
    if one.loss_at_reference is not None:
        yield f"loss where policy and reference agree: {one.loss_at_reference:.6g}"
    yield ""
    for knob in one.knobs:
        said = [*([knob.takes] if knob.takes else []), *([f"{knob.paper} in the paper"] if knob.paper else [])]
        yield f"algorithm.{knob.name}: {_value(knob.default)}" + (f"  ({'; '.join(said)})" if said else "")
        yield from textwrap.wrap(knob.about, width, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _value(value: object) -> str:
    """As it is written in a configuration."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _needs(needs: Needs) -> Iterator[str]:
    """What is switched on, in the words of its declaration."""
    docs, on = _docs(Needs), asdict(needs)
    yield f"{needs.min_samples} responses per prompt or more"
    for field in ("pairs", "reference", "old_logprobs", "entropy", "preferences", "anchor", "auxiliary", "answers", "greedy"):
        if on[field]:
            yield docs[field].partition(". ")[0].rstrip(".")
    if needs.prefix:
        yield f"responses to {needs.prefix:.0%} of the prompts begin with a part of the stored answer"
    if needs.reference_samples:
        yield f"{needs.reference_samples} response of the base model to each prompt, which joins the samples"
    if needs.mixture_samples:
        yield f"{needs.mixture_samples} response of a mixture of policy and reference to each prompt, drawn by the learner"
    if needs.critic is not None:
        yield f"a critic ({needs.critic})"


@cache
def _docs(kind: type) -> Mapping[str, str]:
    """The docstring of each attribute; that of the most special class counts."""
    found: dict[str, str] = {}
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] in ("builtins", "pydantic"):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found.setdefault(statement.target.id, _plain(after.value.value))
    return found


def _plain(doc: str | None) -> str:
    return " ".join((doc or "").split())
