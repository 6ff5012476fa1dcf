"""Writes onlinerl.json, the Grafana dashboard, from the short description below: `python dashboards/make_grafana.py`.

Titles, units, explanations and names of series come from the catalogue of metrics. The queries are tested against a real Prometheus
that scrapes the exporter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.metrics.definition import Definition

TARGET = Path(__file__).with_name("onlinerl.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'run=~"$run"'
WIDTH, HEIGHT, PER_ROW = 8, 7, 3
UNITS = {"s": "s", "bytes": "bytes", "ratio": "percentunit", "bool": "bool_yes_no"}
"""Unit of a metric -> unit of Grafana; the others are written at the axis."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """(query, legend)."""
    unit: str = "none"
    axis: str = ""
    description: str = ""
    stat: bool = False
    """The latest value in large letters instead of a curve."""
    text: str = "value"
    stack: bool = False


def series(name: str, *matchers: str) -> str:
    """A selector that follows the chosen run."""
    return f"{name}{{{','.join((RUN, *matchers))}}}"


def state(title: str, query: str, legend: str = "{{run}}", **options: Any) -> Panel:
    """How the run stands."""
    return Panel(title=title, queries=((query, legend),), stat=True, **options)


def figures(*parts: tuple[str, str], title: str = "", query: str = "%s", matchers: Sequence[str] = (), **options: Any) -> Panel:
    """Metrics of one unit, each with its legend, with confidence bounds where they have them; `query` is asked of each."""
    metrics = [CATALOGUE[name] for name, _ in parts]
    first, queries = metrics[0], []
    for metric, (_, legend) in zip(metrics, parts, strict=True):
        exported = metric.series[0]
        queries.append((query % series(exported.name, *matchers), f"{{{{run}}}} {legend}".strip()))
        if exported.bounds:
            queries.append((series(exported.bounds), f"{queries[-1][1]} {{{{bound}}}}"))
    interval = ", 95 % interval" if any(metric.series[0].bounds for metric in metrics) else ""
    options = {"unit": UNITS.get(first.unit, "none"), "axis": "" if first.unit in {*UNITS, "1"} else first.unit} | options
    return Panel(
        title=(title or first.shown) + interval,
        queries=tuple(queries),
        description="\n".join(map(_explained, metrics)),
        **options,
    )


def figure(name: str, legend: str = "", **options: Any) -> Panel:
    """One metric."""
    return figures((name, legend), **options)


def _explained(metric: Definition) -> str:
    few = f" Below {metric.n_min} {metric.n_of} it must not be trusted for a decision." if metric.n_min else ""
    return f"{metric.name}: {metric.help}.{few}"


def mean_phase_seconds() -> Panel:
    """From the histogram."""
    metric = CATALOGUE["phase_seconds"]
    name = next(s.name for s in metric.series if s.kind == "histogram")
    query = f"{series(f'{name}_sum')} / {series(f'{name}_count')}"
    return Panel(title="Mean seconds per phase, whole run", queries=((query, "{{run}} {{phase}}"),), unit=UNITS[metric.unit])


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Now",
        [
            state("State", f"{series('onlinerl_run_state')} == 1", "{{run}}: {{state}}", text="name"),
            state("Iteration", series("onlinerl_iteration")),
            state("Current phase", f"{series('onlinerl_phase')} == 1", "{{run}}: {{phase}}", text="name"),
            state(
                "Since last progress",
                f"time() - {series('onlinerl_last_progress_timestamp_seconds')}",
                "{{run}} {{role}}",
                unit="s",
            ),
        ],
    ),
    (
        "Quality",
        [
            figure("reward", "{{oracle}}", matchers=('stat="mean"',)),
            figures(
                ("kl_ref", "{{reference}} {{estimator}}"),  # kl_prev is in the same series
                title="KL to the initial and the previous policy",
            ),
            figure("win_rate", "vs {{opponent}}", title="Win rate against base and previous"),
            figure("component_win_rate", "{{component}}"),
            figure("length", "{{stat}}"),
            figure("truncated", matchers=('reason="length"',)),
            Panel(
                title="Measured on too few prompts",
                queries=((series("onlinerl_metric_insufficient"), "{{run}} {{name}}"),),
                description="1: the latest value of this metric must not be trusted for a decision.",
            ),
        ],
    ),
    (
        "Time and throughput",
        [
            figure("phase_seconds", "{{phase}}", stack=True),
            figures(
                ("generated_tokens", "generated"),
                ("trained_tokens", "trained"),
                title="Token rates",
                query="rate(%s[$__rate_interval])",
                axis="tokens/s",
            ),
            mean_phase_seconds(),
        ],
    ),
    (
        "Weight sync",
        [
            figure("weight_sync_seconds"),
            figure("weight_sync_bytes"),
            figure("weight_sync_ok", stat=True),
            figure("weight_sync_failures", stat=True),
            figures(
                ("logp_mismatch", "|difference| {{stat}}"),
                ("logp_mismatch_k3", "k3"),
                ("weight_sync_canary", "canary after the push"),
                title="Log-prob mismatch between learner and engine",
            ),
        ],
    ),
    (
        "Oracle and data",
        [
            figure("oracle_calls", "{{kind}}", query="sum by (run, kind) (%s)"),
            figure(
                "oracle_calls",
                "{{kind}} {{status}}",
                title="Oracle failures",
                query="sum by (run, kind, status) (%s)",
                matchers=('status!="ok"',),
            ),
            figure("oracle_failed", "{{phase}}"),
            figure("oracle_replies_failed", "{{phase}} {{kind}}"),
            figures(("pair_yield", "pair yield"), ("zero_spread", "zero spread"), title="Pair yield and groups without spread"),
            figure("pairs_dropped", "{{reason}}"),
        ],
    ),
    (
        "Learner",
        [
            figure("loss"),
            figure("grad_norm"),
            figure("skipped_steps"),
            figure("learning_rate", unit="sci"),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, described in ROWS:
        panels.append(_row(len(panels) + 1, title, top))
        top += 1
        for index, panel in enumerate(described):
            place = {"x": index % PER_ROW * WIDTH, "y": top + index // PER_ROW * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, place))
        top += -(-len(described) // PER_ROW) * HEIGHT
    return {
        "uid": "onlinerl",
        "title": "onlinerl",
        "tags": ["onlinerl"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": panels,
    }


def text() -> str:
    """The content of onlinerl.json."""
    return json.dumps(dashboard(), indent=2) + "\n"


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {
        "drawStyle": "line",
        "showPoints": "auto",
        "spanNulls": True,
        "axisLabel": panel.axis,
    }
    if panel.stack:
        custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40, "lineInterpolation": "stepAfter"}
    shown: dict[str, Any] = {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "textMode": panel.text,
        "colorMode": "value",
    }
    legend = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {} if panel.stat else custom}, "overrides": []},
        "options": shown if panel.stat else legend,
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": query, "legendFormat": name}
            for i, (query, name) in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}


def _run_variable() -> dict[str, Any]:
    query = "label_values(onlinerl_build_info, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {},
    }


if __name__ == "__main__":
    TARGET.write_text(text())
