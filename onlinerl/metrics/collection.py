"""Definitions by name, and records that agree with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Literal

from onlinerl.errors import ConfigError
from onlinerl.metrics.definition import Column, Definition, Series, per_iteration, per_step
from onlinerl.metrics.vocabulary import ESTIMATORS, UNITS
from onlinerl.types import Metric

Declared = tuple[str, str, str, Literal["step", "iteration"]]
"""A metric as an algorithm declares it: name, help, unit, and who reports it."""


class Catalogue:
    """Metrics, each of them once.

    Args:
        definitions: in the order in which they are documented.
        states: series of Prometheus that are no metrics: how the run stands, and what is wrong with its figures.

    Raises:
        ValueError: if a definition contradicts itself, or two of them or of their series each other.
    """

    def __init__(self, definitions: Sequence[Definition], states: Sequence[Series] = ()) -> None:
        self.definitions, self.states = tuple(definitions), tuple(states)
        self._by_name = {d.name: d for d in self.definitions}
        if len(self._by_name) < len(self.definitions):
            names = [d.name for d in self.definitions]
            raise ValueError(f"defined twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        for definition in self.definitions:
            if problem := _contradiction(definition):
                raise ValueError(f"metric {definition.name!r}: {problem}")
        shapes: dict[str, tuple[object, ...]] = {}
        for series in self.exported():
            shape = (series.kind, tuple(series.labels), series.help)
            if shapes.setdefault(series.name, shape) != shape:
                raise ValueError(f"{series.name}: metrics that share a series share its kind, labels and help")

    def __iter__(self) -> Iterator[Definition]:
        return iter(self.definitions)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Definition:
        try:
            return self._by_name[name]
        except KeyError:
            close = get_close_matches(name, self._by_name, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"no metric {name!r} in the catalogue (onlinerl/metrics/catalogue.py){hint}") from None

    def series(self) -> Iterator[tuple[Definition, Series]]:
        """Every metric with every series that it is exported as."""
        return ((definition, series) for definition in self.definitions for series in definition.series)

    def exported(self) -> Iterator[Series]:
        """All that Prometheus is given, each with a help; several may share a name."""
        yield from self.states
        yield from (replace(series, help=series.help or definition.help) for definition, series in self.series())

    def columns(self) -> dict[str, Column]:
        """How the metrics of the table of iterations are shown, by name."""
        return {d.name: d.column for d in self.definitions if d.column}

    def including(self, more: Iterable[Definition | Declared], owner: str) -> Catalogue:
        """With the metrics that `owner`, an algorithm, declares.

        Raises:
            ConfigError: if one of them contradicts itself, or is there already and is something else.
        """
        definitions = [d if isinstance(d, Definition) else defined(*d) for d in more]
        new = [d for d in definitions if self._by_name.get(d.name) != d]
        try:
            return Catalogue((*self.definitions, *new), self.states)
        except ValueError as error:
            raise ConfigError(
                f"{owner} declares metrics that cannot be recorded: {error}",
                field="algorithm.name",
                fix="see docs/metrics.md for the names that are taken, and for units and estimators",
            ) from None

    def record(
        self,
        name: str,
        value: float,
        *,
        n: int = 1,
        estimator: str | None = None,
        labels: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Metric:
        """A measured value as a record; what the definition says is not said again.

        Args:
            name: of a metric of this catalogue.
            value: in its unit.
            n: how many it was measured on.
            estimator: where the definition leaves a choice.
            labels: all that the definition asks for, and no others.
            more: the other fields of `Metric`.

        Raises:
            ValueError: if the record does not agree with the definition.
        """
        definition, labels = self[name], dict(labels or {})
        if estimator is None and len(definition.estimators) == 1:
            estimator = definition.estimators[0]
        record = Metric(
            name=name,
            value=value,
            unit=definition.unit,
            iteration=more.pop("iteration", 0),
            n=n,
            estimator=estimator or "",
            insufficient=n < (definition.n_min or 0),
            labels=labels,
            **more,
        )
        problem = self.problem(record)
        if problem:
            raise ValueError(problem)
        return record

    def problem(self, record: Metric) -> str | None:
        """In what a record disagrees with its definition; None if in nothing.

        Raises:
            ValueError: if there is no definition.
        """
        definition = self[record.name]
        if record.unit != definition.unit:
            return f"{record.name} is in {definition.unit}, not in {record.unit!r}"
        if record.estimator not in definition.estimators:
            return f"{record.name} is estimated by {' or '.join(definition.estimators)}, not by {record.estimator!r}"
        if record.labels.keys() != definition.labels.keys():
            return f"{record.name} has the labels {sorted(definition.labels)}, not {sorted(record.labels)}"
        for label, value in record.labels.items():
            known = definition.labels[label]
            if known and value not in known:
                return f"{record.name}: {label} is one of {', '.join(known)}, not {value!r}"
        if record.insufficient != (record.n < (definition.n_min or 0)):
            return f"{record.name} may be trusted from n = {definition.n_min} on, and n is {record.n}"
        return None


def defined(name: str, help: str, unit: str, origin: Literal["step", "iteration"]) -> Definition:
    """The definition of a metric that an algorithm declares."""
    return (per_step if origin == "step" else per_iteration)(name, help, unit)


def _contradiction(metric: Definition) -> str | None:
    """What is wrong with a definition, which would be noticed much later; None if nothing is."""
    if not metric.help:
        return "says nowhere what it is"
    if metric.unit not in UNITS:
        return f"unknown unit {metric.unit!r}; choose one of {', '.join(UNITS)}"
    if unknown := [e for e in metric.estimators if e not in ESTIMATORS]:
        return f"unknown estimator {unknown[0]!r}; choose one of {', '.join(ESTIMATORS)}"
    if metric.n_min is None and not {"exact", "mean over steps"}.issuperset(metric.estimators):
        return "is an estimate and does not say the smallest n (n_min) that it may be trusted at"
    for series in metric.series:
        if (series.kind == "counter") != series.name.endswith("_total"):
            return f"{series.name}: counters, and nothing else, end in _total"
        if missing := [label for label, default in series.labels.items() if default is None and label not in metric.labels]:
            return f"{series.name} needs the label {missing[0]!r}, which the metric does not have"
    return None
