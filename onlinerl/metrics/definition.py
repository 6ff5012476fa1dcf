"""What one metric is. Plain data without dependencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Estimator = Literal["exact", "mean", "wilson", "ratio", "k1", "k3", "mean over steps"]
Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """How Prometheus is given a metric, or a state of the run. Every series carries the label `run` as well."""

    name: str
    """Name in Prometheus; counters end in `_total`."""
    help: str = ""
    """For series that several metrics share; otherwise the definition of the metric."""
    kind: Kind = "gauge"
    labels: Mapping[str, str | None] = field(default_factory=dict)
    """Label -> its value if the metric does not carry it; None: the metric must carry it. Other labels are dropped."""
    bounds: str | None = None
    """Name of a gauge with an added label `bound` (lower, upper) for the confidence interval."""

    def names(self) -> tuple[str, ...]:
        """Every name that a query may use."""
        parts = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return (*(f"{self.name}{part}" for part in parts), *((self.bounds,) if self.bounds else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """How a metric is shown in the table of iterations."""

    header: str
    short: str
    """What it is called in remarks under the table."""
    digits: int
    """After the decimal point."""
    interval: bool = False
    """Whether its 95 % interval is shown."""
    say_unit: bool = False
    """Whether the remarks say its unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """One metric; a catalogue checks it."""

    name: str
    help: str
    """What it is, in one sentence."""
    unit: str
    section: str
    """Heading that it stands under in the documentation."""
    title: str = ""
    """What people call it; made from the name if empty."""
    estimators: tuple[Estimator, ...] = ("exact",)
    """How it is estimated; where there are several, each record says which of them it is."""
    n_min: int | None = None
    """Smallest n that it may be trusted at. Below, it is shown and marked, and decides nothing. None: any n will do."""
    n_of: str = "prompts"
    """What n counts."""
    origin: Literal["controller", "step", "iteration"] = "controller"
    """Who reports it: the controller, the loss or learner at each optimizer step, `Algorithm.figures` for each iteration."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels of its records -> their values; () where anything may come."""
    series: tuple[Series, ...] = ()
    """In Prometheus."""
    column: Column | None = None
    """In the table of iterations."""

    @property
    def shown(self) -> str:
        """Its name for people."""
        return self.title or self.name.replace("_", " ").capitalize()


def per_step(
    name: str, help: str, unit: str, *, section: str = "", title: str = "", series: tuple[Series, ...] = ()
) -> Definition:
    """A metric that a loss returns in `LossOutput.metrics`: averaged over the batch, then over the steps of the iteration."""
    return Definition(
        name=name,
        help=help,
        unit=unit,
        section=section,
        title=title,
        estimators=("mean over steps",),
        n_of="steps",
        origin="step",
        series=series,
    )


def per_iteration(name: str, help: str, unit: str, *, section: str = "", series: tuple[Series, ...] = ()) -> Definition:
    """A metric that an algorithm returns from `figures`."""
    return Definition(name=name, help=help, unit=unit, section=section, n_of="items", origin="iteration", series=series)
