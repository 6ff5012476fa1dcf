"""Writes docs/metrics.md from the catalogue of metrics and from what algorithms declare: `python tools/metrics_docs.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from onlinerl import registry
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.metrics.collection import Catalogue, defined
from onlinerl.metrics.definition import Definition, Series
from onlinerl.metrics.vocabulary import ESTIMATORS, UNITS
from onlinerl.protocols.algorithm import Algorithm

TARGET = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

Written by `python tools/metrics_docs.py` from `onlinerl/metrics/catalogue.py`; a test compares the two.

`metrics.jsonl` in the run directory holds one record per figure: its value, n, estimator, standard error and 95 % interval where it is
an estimate, iteration, attempt and labels. The unit of independence is the prompt. A figure that was measured on fewer than its smallest
n is recorded and shown, marked as `insufficient`, and decides nothing. In Prometheus every series carries the label `run`, and
`onlinerl_metric_insufficient{name=...}` is 1 for such a figure.
"""


def document(catalogue: Catalogue, declared: Mapping[str, Sequence[Definition]]) -> str:
    """The page: all metrics by section, then those that only one algorithm has (`declared`: its name -> what it declares)."""
    sections: dict[str, list[Definition]] = {}
    for definition in catalogue:
        sections.setdefault(definition.section, []).append(definition)
    # An algorithm that builds on another one has the metrics of that one.
    own = [definition for definitions in declared.values() for definition in definitions]
    for index, definition in enumerate(own):
        if definition not in own[:index]:
            names = ", ".join(f"`{name}`" for name, definitions in sorted(declared.items()) if definition in definitions)
            sections.setdefault(f"Only {names}", []).append(definition)
    parts = [HEAD, *(f"## {title}\n\n{_table(definitions)}" for title, definitions in sections.items())]
    parts.append(f"## State of the run, in Prometheus only\n\n{_states(catalogue.states)}")
    parts.append(f"## Estimators\n\n{_legend('estimator', ESTIMATORS)}")
    parts.append(f"## Units\n\n{_legend('unit', {unit: meaning for unit, meaning in UNITS.items() if meaning})}")
    return "\n".join(parts)


def text() -> str:
    """The content of docs/metrics.md."""
    names = registry.names("algorithms")
    reported = {name: registry.load("algorithms", name, Algorithm)().metrics for name in names}
    return document(CATALOGUE, {name: [defined(*metric) for metric in metrics] for name, metrics in reported.items()})


def _table(definitions: Iterable[Definition]) -> str:
    rows = [
        (
            f"`{d.name}`{_labels(d.labels)}",
            d.unit,
            d.help,
            ", ".join(d.estimators),
            f"{d.n_min:,} {d.n_of}" if d.n_min else "any",
            "<br>".join(_series(s, d.labels) for s in d.series),
        )
        for d in definitions
    ]
    return _rows(("name", "unit", "definition", "estimator", "smallest n", "Prometheus"), rows)


def _states(states: Iterable[Series]) -> str:
    return _rows(("series", "definition"), [(_series(s), s.help) for s in states])


def _legend(head: str, meanings: Mapping[str, str]) -> str:
    return _rows((head, "meaning"), [(f"`{name}`", meaning) for name, meaning in meanings.items()])


def _labels(labels: Mapping[str, tuple[str, ...]]) -> str:
    return "".join(f"<br>{label}: {', '.join(values) or '...'}" for label, values in labels.items())


def _series(series: Series, varying: Iterable[str] = ()) -> str:
    labels = ", ".join(
        label if default is None or label in varying else f'{label}="{default}"' for label, default in series.labels.items()
    )
    bounds = f", its interval as `{series.bounds}`" if series.bounds else ""
    return f"`{series.name}{{{labels}}}` ({series.kind}){bounds}" if labels else f"`{series.name}` ({series.kind}){bounds}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    TARGET.write_text(text())
