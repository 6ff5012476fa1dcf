"""Every metric is described once, and all that shows it is made from that description."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import documents
import pytest
import yaml
from prometheus_client import generate_latest
from rich.console import Console

from onlinerl.errors import ConfigError
from onlinerl.metrics.catalogue import CATALOGUE, STATES
from onlinerl.metrics.collection import Catalogue
from onlinerl.metrics.definition import Definition, Series, per_step
from onlinerl.trackers.console import render_table
from onlinerl.trackers.prometheus import PrometheusTracker
from onlinerl.types import Metric

ROOT = Path(__file__).parents[2]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def definition(**more) -> Definition:
    return Definition(
        **{"name": "surprise", "help": "How unexpected it was", "unit": "nats", "section": "Held-out evaluation"} | more
    )


# --- one description ---


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"estimators": ("mean",)}, "does not say the smallest n"),
        ({"unit": "nat"}, "unknown unit 'nat'"),
        ({"help": ""}, "says nowhere what it is"),
        ({"estimators": ("median",), "n_min": 5}, "unknown estimator 'median'"),
        ({"series": (Series(name="onlinerl_x", kind="counter"),)}, "end in _total"),
        ({"series": (Series(name="onlinerl_x_total"),)}, "end in _total"),
        ({"series": (Series(name="onlinerl_x", labels={"phase": None}),)}, "needs the label 'phase'"),
    ],
)
def test_a_definition_that_contradicts_itself_is_refused(more, problem):
    Catalogue([definition()])
    with pytest.raises(ValueError, match=problem):
        Catalogue([definition(**more)])


def test_definitions_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="defined twice: surprise"):
        Catalogue([definition(), definition(unit="ratio")])
    shared = [definition(name=name, help=name, series=(Series(name="onlinerl_x"),)) for name in ("one", "two")]
    with pytest.raises(ValueError, match="share its kind, labels and help"):
        Catalogue(shared)
    Catalogue([replace(d, series=(Series(name="onlinerl_x", help="both"),)) for d in shared])


def test_names_and_labels_follow_the_conventions_of_prometheus():
    allowed = {
        "tracker",
        "component",
        "phase",
        "opponent",
        "control",
        "state",
        "oracle",
        "reason",
        "kind",
        "status",
        "stat",
        "reference",
        "estimator",
        "age",
    }
    ends = {"s": "_seconds", "bytes": "_bytes", "nats/token": "_nats", "nats/sequence": "_nats", "ratio": "_ratio"}
    for metric, series in CATALOGUE.series():
        assert series.name.startswith("onlinerl_")
        assert set(series.labels) <= allowed
        if series.kind != "counter":
            assert series.name.endswith(ends.get(metric.unit, "")), f"{series.name} is in {metric.unit}"


def test_records_take_what_the_catalogue_says():
    record = CATALOGUE.record("win_rate", 0.6, n=399, ci_low=0.5, labels={"opponent": "base", "control": "raw"}, iteration=3)
    assert (record.unit, record.estimator, record.insufficient) == ("ratio", "wilson", True)
    assert (record.n, record.ci_low, record.iteration) == (399, 0.5, 3)
    assert not replace(CATALOGUE.record("length", 9.0, n=400)).insufficient
    assert not CATALOGUE.record("prompts_sampled", 1.0).insufficient


@pytest.mark.parametrize(
    ("name", "more", "problem"),
    [
        ("winrate", {}, "no metric 'winrate' in the catalogue .* did you mean 'win_rate'"),
        ("win_rate", {}, r"has the labels \['control', 'opponent'\], not \[\]"),
        ("length", {"labels": {"stat": "mean"}}, "has the labels"),
        ("kl_conflict", {"labels": {"reference": "base"}}, "reference is one of initial, prev_iter, not 'base'"),
        ("kl_ref", {"labels": {"estimator": "k3"}}, "estimated by k1 or k3, not by ''"),
        ("kl_ref", {"labels": {"estimator": "k3"}, "estimator": "mean"}, "estimated by k1 or k3, not by 'mean'"),
    ],
)
def test_a_record_that_the_catalogue_does_not_know_is_an_error(name, more, problem):
    with pytest.raises(ValueError, match=problem):
        CATALOGUE.record(name, 0.5, **more)


def test_a_record_made_without_the_catalogue_is_compared_with_it():
    made = CATALOGUE.record("reward", 0.5, n=10, labels={"oracle": "proxy"})
    assert CATALOGUE.problem(made) is None
    assert "is in reward, not in 'nats'" in CATALOGUE.problem(replace(made, unit="nats"))
    assert "may be trusted from n = 400 on, and n is 10" in CATALOGUE.problem(replace(made, insufficient=False))
    with pytest.raises(ValueError, match="no metric"):
        CATALOGUE.problem(Metric(name="other", value=0.0, unit="1", iteration=0))


def test_an_algorithm_adds_its_metrics_and_takes_nobody_elses():
    own = per_step("surprise", "How unexpected it was", "nats")
    assert CATALOGUE.including([own, CATALOGUE["margin"]], "mine")["surprise"].estimators == ("mean over steps",)
    assert "surprise" not in CATALOGUE
    with pytest.raises(ConfigError, match="mine declares metrics that cannot be recorded: defined twice: reward") as caught:
        CATALOGUE.including([per_step("reward", "Mine", "reward")], "mine")
    assert caught.value.field == "algorithm.name"
    with pytest.raises(ConfigError, match="metric 'wow': unknown unit 'wows'; choose one of 1, "):
        CATALOGUE.including([per_step("wow", "How unexpected it was", "wows")], "mine")


# --- what is made of it ---


def test_a_new_metric_costs_one_entry():
    """That of docs/add-a-part.md: Prometheus, the documentation and the table of iterations have it at once."""
    printed: dict[str, Definition] = {}
    document = documents.ROOT / "docs/add-a-part.md"
    [block] = [block for block in documents.scripts(document) if "Definition(" in block.text]
    documents.execute(document, block, printed)
    catalogue = Catalogue((*CATALOGUE, printed["surprise"]), STATES)

    exporter = PrometheusTracker("demo", port=0, catalogue=catalogue)
    exporter.log([catalogue.record("surprise", 2.5, n=49)])
    exported = generate_latest(exporter._registry).decode()
    exporter.close()
    assert "# HELP onlinerl_surprise_nats How unexpected it was" in exported
    assert 'onlinerl_surprise_nats{run="demo"} 2.5' in exported
    assert 'onlinerl_metric_insufficient{name="surprise",run="demo"} 1.0' in exported

    page = script("tools/metrics_docs.py").document(catalogue, {})
    row = "| `surprise` | nats | How unexpected it was | mean | 50 prompts | `onlinerl_surprise_nats` (gauge) |"
    heldout, rest = page.split("## Sampling")
    assert row in heldout
    assert row not in rest

    row = {"iteration": 1, "surprise": 2.5, "insufficient": ["surprise"], "phases": {}, "status": "promoted"}
    shown = io.StringIO()
    Console(file=shown, width=140).print(render_table({"run": "demo", "algorithm": "dpo", "iterations": [row]}, catalogue))
    table = " ".join(shown.getvalue().split())
    assert "it reward KL base win rate vs base len wow" in table
    assert "1 - - - - 2.5" in table
    assert "too few prompts to decide by: wow" in table


def test_the_documentation_is_what_its_generator_writes():
    assert (ROOT / "docs/metrics.md").read_text() == script("tools/metrics_docs.py").text(), "run python tools/metrics_docs.py"


# --- dashboard and alerts ---

SELECTOR, MATCHER = re.compile(r"(onlinerl_\w+)(?:\{([^}]*)\})?"), re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
DASHBOARD = json.loads((ROOT / "dashboards/onlinerl.json").read_text())
PANELS = [(p["title"], t["expr"], t["legendFormat"]) for p in DASHBOARD["panels"] for t in p.get("targets", ())]
ALERTS = [(r["alert"], r["expr"]) for r in yaml.safe_load((ROOT / "dashboards/alerts.yml").read_text())["groups"][0]["rules"]]


def exported_labels(catalogue: Catalogue) -> dict[str, dict[str, set[str]]]:
    """Every name that a query may use -> its labels -> their values; an empty set where anything may come."""
    found: dict[str, dict[str, set[str]]] = {}
    known = [(s, {"name": tuple(d.name for d in catalogue)}) for s in catalogue.states]
    known += [(series, metric.labels) for metric, series in catalogue.series()]
    for series, values in known:
        for name in series.names():
            labels = found.setdefault(
                name, {"run": set(), "bound": {"lower", "upper"}} if name == series.bounds else {"run": set()}
            )
            for label, default in series.labels.items():
                labels.setdefault(label, set()).update(values.get(label, (default,) if default else ()))
    return found


def unknown(query: str, catalogue: Catalogue, legend: str = "") -> list[str]:
    """What a query, and the legend of its curves, name that the catalogue does not have."""
    labels_of, problems, seen = exported_labels(catalogue), [], {"run"}
    for name, matchers in SELECTOR.findall(query):
        if name not in labels_of:
            problems.append(name)
            continue
        seen |= labels_of[name].keys()
        for label, operator, value in MATCHER.findall(matchers):
            values = labels_of[name].get(label)
            if values is None or (values and operator == "=" and value not in values):
                problems.append(f"{name}{{{label}{operator}{value}}}")
    named = {label.strip() for group in GROUPING.findall(query) for label in group.split(",")}
    return problems + sorted((named | set(re.findall(r"\{\{(\w+)\}\}", legend))) - seen)


@pytest.mark.parametrize(("title", "query", "legend"), PANELS, ids=[f"{p[0]}-{i}" for i, p in enumerate(PANELS)])
def test_a_panel_names_only_what_the_catalogue_has(title, query, legend):
    assert unknown(query, CATALOGUE, legend) == []


@pytest.mark.parametrize(("alert", "query"), ALERTS, ids=[a[0] for a in ALERTS])
def test_an_alert_names_only_what_the_catalogue_has(alert, query):
    assert unknown(query, CATALOGUE) == []


def test_whatever_is_renamed_is_missed_by_the_panels_and_alerts_that_name_it():
    """The three tests above are no empty words: a renamed series, label, label value or metric is found."""
    queries = [(query, legend) for _, query, legend in PANELS] + [(query, "") for _, query in ALERTS]
    named = {name for query, _ in queries for name, _ in SELECTOR.findall(query)}
    assert len(named) > 30
    for old in named:
        definitions = [replace(d, series=tuple(_renamed(s, old) for s in d.series)) if d.series else d for d in CATALOGUE]
        changed = Catalogue(definitions, [_renamed(s, old) for s in STATES])
        missed = [query for query, _ in queries if unknown(query, changed)]
        assert missed
        assert all(old in query for query in missed)
    for query, problem in (
        ("onlinerl_finish_ratio{cause='length'}".replace("'", '"'), "onlinerl_finish_ratio{cause=length}"),
        ('onlinerl_finish_ratio{reason="cut"}', "onlinerl_finish_ratio{reason=cut}"),
        ('onlinerl_metric_insufficient{name="cut_off"}', "onlinerl_metric_insufficient{name=cut_off}"),
        ("sum by (run, oracle) (onlinerl_loss)", "oracle"),
    ):
        assert unknown(query, CATALOGUE) == [problem]
    assert unknown("onlinerl_loss", CATALOGUE, "{{run}} {{stage}}") == ["stage"]


def _renamed(series: Series, old: str) -> Series:
    """Under another name if this is the series that is called `old`, or has its bounds or a part of its histogram called so."""
    if series.bounds == old:
        return replace(series, bounds=f"{old}_renamed")
    if old not in series.names():
        return series
    return replace(
        series, name=series.name.removesuffix("_total") + "_renamed" + ("_total" if series.kind == "counter" else "")
    )


def test_no_alert_believes_a_figure_of_too_few_prompts():
    doubtful = {name: d.name for d, s in CATALOGUE.series() if d.n_min for name in s.names()}
    for alert, query in ALERTS:
        for name in {name for name, _ in SELECTOR.findall(query)} & doubtful.keys():
            assert f'unless on (run) onlinerl_metric_insufficient{{name="{doubtful[name]}"}} == 1' in " ".join(query.split()), (
                alert
            )
