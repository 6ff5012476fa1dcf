"""Writes onlinerl.json, the Grafana dashboard, from the short description below: `python dashboards/make_grafana.py`.

The queries are tested against a real Prometheus that scrapes the exporter, so a renamed metric breaks a test and not a dashboard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("onlinerl.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'run=~"$run"'
WIDTH, HEIGHT, PER_ROW = 8, 7, 3

# (title, unit of Grafana, [(query, legend)], options)
Panel = tuple[str, str, list[tuple[str, str]], dict[str, Any]]


def series(name: str, *matchers: str) -> str:
    """A selector that follows the chosen run."""
    return f"{name}{{{','.join((RUN, *matchers))}}}"


FAILED_CALLS = series("onlinerl_oracle_calls_total", 'status!="ok"')

ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Now",
        [
            (
                "State",
                "none",
                [(f"{series('onlinerl_run_state')} == 1", "{{run}}: {{state}}")],
                {"type": "stat", "text": "name"},
            ),
            ("Iteration", "none", [(series("onlinerl_iteration"), "{{run}}")], {"type": "stat"}),
            (
                "Current phase",
                "none",
                [(f"{series('onlinerl_phase')} == 1", "{{run}}: {{phase}}")],
                {"type": "stat", "text": "name"},
            ),
            (
                "Since last progress",
                "s",
                [(f"time() - {series('onlinerl_last_progress_timestamp_seconds')}", "{{run}} {{role}}")],
                {"type": "stat"},
            ),
        ],
    ),
    (
        "Quality",
        [
            (
                "Reward on held-out prompts, 95 % interval",
                "none",
                [
                    (series("onlinerl_reward", 'stat="mean"'), "{{run}} {{oracle}}"),
                    (series("onlinerl_reward_bound"), "{{run}} {{oracle}} {{bound}}"),
                ],
                {},
            ),
            (
                "KL to the initial and the previous policy",
                "none",
                [(series("onlinerl_kl_nats"), "{{run}} {{reference}} {{estimator}}")],
                {"axis": "nats per sequence"},
            ),
            (
                "Win rate against base and previous, 95 % interval",
                "percentunit",
                [
                    (series("onlinerl_win_rate_ratio"), "{{run}} vs {{opponent}}"),
                    (series("onlinerl_win_rate_bound_ratio"), "{{run}} vs {{opponent}} {{bound}}"),
                ],
                {},
            ),
            ("Response length", "none", [(series("onlinerl_response_length_tokens"), "{{run}} {{stat}}")], {"axis": "tokens"}),
            ("Truncated responses", "percentunit", [(series("onlinerl_finish_ratio", 'reason="length"'), "{{run}}")], {}),
            (
                "Measured on too few prompts",
                "none",
                [(f"{series('onlinerl_metric_insufficient')}", "{{run}} {{name}}")],
                {"description": "1: the latest value of this metric must not be trusted for a decision."},
            ),
        ],
    ),
    (
        "Time and throughput",
        [
            ("Seconds per phase", "s", [(series("onlinerl_phase_seconds"), "{{run}} {{phase}}")], {"stack": True}),
            (
                "Token rates",
                "none",
                [
                    (f"rate({series('onlinerl_generated_tokens_total')}[$__rate_interval])", "{{run}} generated"),
                    (f"rate({series('onlinerl_trained_tokens_total')}[$__rate_interval])", "{{run}} trained"),
                ],
                {"axis": "tokens/s"},
            ),
            (
                "Mean seconds per phase, whole run",
                "s",
                [
                    (
                        f"{series('onlinerl_phase_duration_seconds_sum')} / {series('onlinerl_phase_duration_seconds_count')}",
                        "{{run}} {{phase}}",
                    )
                ],
                {},
            ),
        ],
    ),
    (
        "Weight sync",
        [
            ("Push and proof", "s", [(series("onlinerl_weight_sync_seconds"), "{{run}}")], {}),
            ("Bytes pushed", "bytes", [(series("onlinerl_weight_sync_bytes"), "{{run}}")], {}),
            ("Delivery proved", "bool_yes_no", [(series("onlinerl_weight_sync_ok"), "{{run}}")], {"type": "stat"}),
            ("Failed pushes", "none", [(series("onlinerl_weight_sync_failures_total"), "{{run}}")], {"type": "stat"}),
            (
                "Log-prob mismatch between learner and engine",
                "none",
                [
                    (series("onlinerl_logprob_mismatch_nats"), "{{run}} |difference| {{stat}}"),
                    (series("onlinerl_logprob_mismatch_k3_nats"), "{{run}} k3"),
                    (series("onlinerl_weight_sync_canary_nats"), "{{run}} canary after the push"),
                ],
                {"axis": "nats per token"},
            ),
        ],
    ),
    (
        "Oracle and data",
        [
            (
                "Oracle calls",
                "none",
                [(f"sum by (run, kind) ({series('onlinerl_oracle_calls_total')})", "{{run}} {{kind}}")],
                {},
            ),
            (
                "Oracle failures",
                "none",
                [
                    (
                        f"sum by (run, kind, status) ({FAILED_CALLS})",
                        "{{run}} {{kind}} {{status}}",
                    )
                ],
                {},
            ),
            (
                "Groups that the oracle could not judge",
                "percentunit",
                [(series("onlinerl_oracle_failed_ratio"), "{{run}} {{phase}}")],
                {},
            ),
            (
                "Pair yield and groups without spread",
                "percentunit",
                [
                    (series("onlinerl_pair_yield_ratio"), "{{run}} pair yield"),
                    (series("onlinerl_zero_spread_ratio"), "{{run}} zero spread"),
                ],
                {},
            ),
            ("Pairs dropped", "none", [(series("onlinerl_pairs_dropped_total"), "{{run}} {{reason}}")], {}),
        ],
    ),
    (
        "Learner",
        [
            ("Loss", "none", [(series("onlinerl_loss"), "{{run}}")], {}),
            ("Gradient norm", "none", [(series("onlinerl_grad_norm"), "{{run}}")], {}),
            ("Skipped steps", "none", [(series("onlinerl_skipped_steps"), "{{run}}")], {}),
            ("Learning rate", "sci", [(series("onlinerl_learning_rate"), "{{run}}")], {}),
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
    title, unit, queries, options = panel
    stat = options.get("type") == "stat"
    custom: dict[str, Any] = {
        "drawStyle": "line",
        "showPoints": "auto",
        "spanNulls": True,
        "axisLabel": options.get("axis", ""),
    }
    if options.get("stack"):
        custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40, "lineInterpolation": "stepAfter"}
    shown: dict[str, Any] = {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "textMode": options.get("text", "value"),
        "colorMode": "value",
    }
    legend = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": "stat" if stat else "timeseries",
        "title": title,
        "description": options.get("description", ""),
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {} if stat else custom}, "overrides": []},
        "options": shown if stat else legend,
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": query, "legendFormat": name}
            for i, (query, name) in enumerate(queries)
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
