"""Trackers show what they are told, and the metrics file is the truth."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import math
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from onlinerl import registry
from onlinerl.config.roles import build
from onlinerl.errors import ConfigError, StoreError
from onlinerl.graph import NAMES
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.protocols.tracker import Tracked, Tracker
from onlinerl.trackers import console as console_module
from onlinerl.trackers._fanout import FanoutTracker
from onlinerl.trackers.console import ConsoleTracker, render_table, sturdy_console
from onlinerl.trackers.jsonl import JsonlTracker, caveats, read_metrics
from onlinerl.trackers.prometheus import Prometheus, PrometheusTracker, totals
from onlinerl.trackers.tensorboard import TensorboardTracker
from onlinerl.types import Metric

DASHBOARDS = Path(__file__).parents[2] / "dashboards"


def metric(name="reward", value=0.5, iteration=1, **more):
    return Metric(name=name, value=value, unit="u", iteration=iteration, **more)


def drive(tracker: Tracker) -> None:
    """What the controller does with a tracker in one iteration."""
    tracker.note("hello [bold] /a/path")
    tracker.phase_started(1, "sample", 4, "prompts")
    tracker.phase_advanced(1, "sample", 3)
    tracker.phase_finished(1, "sample", 2.0)
    tracker.phase_started(1, "train", None, "")
    tracker.phase_finished(1, "train", 1.0)
    tracker.log([metric(), metric("win_rate", 0.6, ci_low=0.5, ci_high=0.7, labels={"opponent": "base"})])
    tracker.log([metric("kl_ref", math.nan, labels={"estimator": "k3"})])
    tracker.close()
    tracker.close()


@pytest.mark.parametrize("name", registry.names("trackers"))
def test_every_tracker_takes_what_a_run_tells_it(name, tmp_path):
    chosen = build({"name": name, **({"port": 0} if name == "prometheus" else {})}, "tracker")
    if name in ("console", "jsonl"):
        with pytest.raises(ConfigError, match="is what every run has"):
            chosen.check()  # a second one would write everything twice
    else:
        chosen.check()
    said = io.StringIO()
    directory = tmp_path / "runs" / "r"
    directory.mkdir(parents=True)
    drive(chosen.open(Tracked(name="r", directory=directory, catalogue=CATALOGUE, earlier=[], console=Console(file=said))))
    assert said.getvalue() or any(tmp_path.rglob("*.*")), "it has left something"


def test_fanout_tells_everybody_even_from_a_generator(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    tracker = FanoutTracker([JsonlTracker(p) for p in paths])
    tracker.log(m for m in [metric()])
    drive(tracker)
    assert paths[0].read_text() == paths[1].read_text() != ""


class Broken(Tracker):
    """Fails whatever it is told."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def log(self, metrics) -> None:
        raise self.error

    def note(self, text: str) -> None:
        raise self.error

    def close(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(5, "no terminal"),
        UnicodeEncodeError("ascii", "\u00e9", 0, 1, "no"),
        KeyError("label"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_tracker_that_fails_ends_nothing_and_is_counted(tmp_path, caplog, error):
    said = io.StringIO()
    tracker = FanoutTracker([Broken(error), ConsoleTracker(Console(file=said)), JsonlTracker(tmp_path / "m")])
    tracker.log([metric()])
    tracker.note("hello")
    tracker.log([metric(iteration=3)])
    drive(tracker)
    records = [r for r in read_metrics(tmp_path / "m") if r["name"] == "tracker_failures"]
    assert records[0]["labels"] == {"tracker": "Broken"}
    assert max(r["value"] for r in records) >= 2, "every failure counts"
    assert "hello" in said.getvalue(), "the others are told"
    assert said.getvalue().count("Broken failed and may miss figures from here on; the run goes on") == 1
    assert len(caplog.records) == 1


def test_a_tracker_may_say_that_the_run_must_not_go_on(tmp_path):
    tracker = FanoutTracker([Broken(StoreError("metrics.jsonl cannot be written"))])
    with pytest.raises(StoreError):
        tracker.log([metric()])


class GoneStream(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_the_console_falls_silent_when_nobody_reads(monkeypatch, caplog):
    console = sturdy_console()
    monkeypatch.setattr("sys.stdout", GoneStream())
    for _ in range(3):
        console.print("text")
    assert len(caplog.records) == 1


def test_a_progress_bar_on_a_sturdy_console(monkeypatch):
    """rich puts a proxy in the place of stdout meanwhile."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    tracker = ConsoleTracker(sturdy_console())
    tracker.phase_started(1, "train", 4, "items")
    assert type(sys.stdout).__name__ == "FileProxy"
    tracker.phase_advanced(1, "train", 2)
    sys.stdout.write("a library says something\n")
    tracker.note("noted")
    tracker.phase_finished(1, "train", 1.0)
    tracker.close()
    assert "a library says something" in stream.getvalue()
    assert "noted" in stream.getvalue()


# --- metrics.jsonl ---


def test_records_hold_every_field_and_nan_is_null(tmp_path):
    tracker = JsonlTracker(tmp_path / "run" / "metrics.jsonl")
    tracker.log([metric(value=math.nan, n=7, se=math.inf, labels={"oracle": "proxy"})])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {
        "name": "reward",
        "value": None,
        "unit": "u",
        "iteration": 1,
        "n": 7,
        "se": None,
        "ci_low": None,
        "ci_high": None,
        "estimator": "mean",
        "policy_version": None,
        "oracle_version": None,
        "set": None,
        "attempt": 0,
        "insufficient": False,
        "labels": {"oracle": "proxy"},
    }
    tracker.close()


def test_a_resumed_run_supersedes_what_it_measures_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for attempt, value in ((0, 1.0), (2, 3.0), (1, 2.0)):
        tracker = JsonlTracker(path)
        tracker.log(
            [metric(value=value, attempt=attempt), metric("kl_ref", value, attempt=attempt, labels={"estimator": "k3"})]
        )
        tracker.log([metric(value=value, iteration=2 + attempt)])
        tracker.close()
    found = {(r["name"], r["iteration"]): r["value"] for r in read_metrics(path)}
    assert found == {("reward", 1): 3.0, ("kl_ref", 1): 3.0, ("reward", 2): 1.0, ("reward", 3): 2.0, ("reward", 4): 3.0}
    assert len(path.read_text().splitlines()) == 9, "append-only"


def test_a_file_torn_at_any_byte_stays_readable(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log([metric(iteration=i, labels={"reason": "é\n"}) for i in range(3)])
    tracker.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        tracker = JsonlTracker(path)
        tracker.log([metric(iteration=99)])
        tracker.close()
        # A line that lacks nothing but its end counts as a line.
        complete = sum(1 for end in (i for i, b in enumerate(whole) if b == ord("\n")) if end <= cut)
        assert [r["iteration"] for r in read_metrics(path)] == [*range(complete), 99], cut


def test_a_damaged_figure_is_skipped_and_stops_nobody(tmp_path):
    """A resume reads the file for its counters: each bit is flipped once."""
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log([metric("pairs_dropped", 2.0, labels={"reason": "tie"}), metric("generated_tokens", 10.0)])
    tracker.close()
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        counted = totals(read_metrics(path))
        assert len(counted) <= 2


def test_what_a_metrics_file_has_lost_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = {0: ["answer", "measure"], 1: ["sample", "label"], 2: ["sample"]}
    assert caveats(path, {}) == []
    (said,) = caveats(path, done)
    assert said.startswith(f"{path} is gone, and with it the figures of iterations 0, 1.")
    tracker = JsonlTracker(path)
    tracker.log([metric(iteration=0), metric(iteration=1)])
    tracker.close()
    assert caveats(path, done) == []
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # a record that lacks nothing but its end
    assert caveats(path, done) == []
    path.write_bytes(whole[:-9])
    lost, torn = caveats(path, done)
    assert lost.startswith(f"{path} has no figures of iteration 1.")
    assert torn == f"the last line of {path} was cut short: that figure is skipped, and the file goes on behind it"
    JsonlTracker(path).close()
    assert caveats(path, done) == [lost], "a line that was torn is said once"


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "none") == []


def test_a_metrics_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        JsonlTracker(tmp_path / "file" / "metrics.jsonl")
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        tracker.phase_finished(1, "sample", 1.0)
    tracker.close()


# --- prometheus ---


def scrape(tracker):
    """{(series, labels without run): value}; asserts that `run` is everywhere."""
    with urllib.request.urlopen(f"http://127.0.0.1:{tracker.port}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["run"] == "demo", sample
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "run"))
            found[sample.name, labels] = sample.value
    return found


@pytest.fixture
def exporter():
    tracker = PrometheusTracker("demo", port=0, oracle_kinds=["reward_model"], drop_reasons=["tie"])
    yield tracker
    tracker.close()


@pytest.mark.parametrize(("name", "series"), [pytest.param(d.name, s, id=f"{d.name}-{s.name}") for d, s in CATALOGUE.series()])
def test_every_metric_with_a_series_arrives(exporter, name, series):
    labels = {label: "x" for label in series.labels}
    exporter.log([metric(name, 3.25, ci_low=3.0, ci_high=3.5, labels={**labels, "step": "7"})])
    found = scrape(exporter)
    key = tuple(sorted(labels.items()))
    exported = f"{series.name}_sum" if series.kind == "histogram" else series.name
    assert found[exported, key] == 3.25
    if series.bounds:
        assert found[series.bounds, tuple(sorted({**labels, "bound": "lower"}.items()))] == 3.0
        assert found[series.bounds, tuple(sorted({**labels, "bound": "upper"}.items()))] == 3.5


def test_missing_labels_take_the_default_and_unknown_metrics_are_not_exported(exporter):
    exporter.log([metric("kl_ref", 1.5), metric("kl_prev", 0.5, labels={"estimator": "k1"}), metric("no_such_metric")])
    exporter.log([metric("pairs_dropped", 5.0)])  # lacks the reason: counted nowhere
    found = scrape(exporter)
    assert found["onlinerl_kl_nats", (("estimator", "k3"), ("reference", "initial"), ("stat", "mean"))] == 1.5
    assert found["onlinerl_kl_nats", (("estimator", "k1"), ("reference", "prev_iter"), ("stat", "mean"))] == 0.5
    assert not [key for key in found if "no_such" in str(key)]
    assert found["onlinerl_pairs_dropped_total", (("reason", "tie"),)] == 0.0


def test_insufficient_values_are_exported_and_flagged(exporter):
    exporter.log([metric(value=0.7, insufficient=True), metric("length", 20.0)])
    found = scrape(exporter)
    assert found["onlinerl_reward", (("oracle", "proxy"), ("stat", "mean"))] == 0.7
    assert found["onlinerl_metric_insufficient", (("name", "reward"),)] == 1
    assert found["onlinerl_metric_insufficient", (("name", "length"),)] == 0


def test_values_that_are_not_finite_are_counted_and_never_become_zero(exporter):
    exporter.log([metric(value=math.nan), metric("generated_tokens", math.nan), metric("generated_tokens", 5.0)])
    found = scrape(exporter)
    assert math.isnan(found["onlinerl_reward", (("oracle", "proxy"), ("stat", "mean"))])
    assert math.isnan(found["onlinerl_reward_bound", (("bound", "lower"), ("oracle", "proxy"), ("stat", "mean"))])
    assert found["onlinerl_generated_tokens_total", ()] == 5.0
    assert found["onlinerl_nonfinite_total", (("reason", "reward"),)] == 1


def test_counters_start_at_zero_add_up_and_continue_after_a_restart(exporter, tmp_path):
    labels = {"kind": "reward_model", "status": "failed"}
    key = tuple(sorted(labels.items()))
    assert scrape(exporter)["onlinerl_oracle_calls_total", key] == 0.0
    assert scrape(exporter)["onlinerl_generated_tokens_total", ()] == 0.0
    logged = [metric("oracle_calls", 2.0, labels=labels), metric("oracle_calls", 3.0, iteration=2, labels=labels)]
    logged += [metric("generated_tokens", 10.0), metric("pairs_dropped", 1.0, labels={"reason": 'a "b"\\\n'}), metric()]
    exporter.log(logged)
    truth = JsonlTracker(tmp_path / "metrics.jsonl")
    truth.log(logged)
    truth.close()
    kept = exporter.counters()
    assert kept['onlinerl_oracle_calls_total{kind="reward_model",status="failed"}'] == 5.0
    recomputed = totals(read_metrics(tmp_path / "metrics.jsonl"))
    assert recomputed == {k: v for k, v in kept.items() if v > 0}
    for counters in (kept, recomputed):
        again = PrometheusTracker("demo", port=0)
        again.restore({**json.loads(json.dumps(counters)), "onlinerl_of_an_older_version_total": 4.0})
        again.log([metric("generated_tokens", 1.0)])
        found = scrape(again)
        again.close()
        assert found["onlinerl_oracle_calls_total", key] == 5.0
        assert found["onlinerl_generated_tokens_total", ()] == 11.0
        assert found["onlinerl_pairs_dropped_total", (("reason", 'a "b"\\\n'),)] == 1.0


def test_the_running_phase_and_the_last_progress_are_shown(exporter):
    def phases():
        return {dict(labels)["phase"]: v for (name, labels), v in scrape(exporter).items() if name == "onlinerl_phase"}

    def progress():
        return scrape(exporter)["onlinerl_last_progress_timestamp_seconds", (("role", "controller"),)]

    assert set(phases().values()) == {0.0}
    started = progress()
    exporter.phase_started(3, "train", 10, "items")
    assert [p for p, v in phases().items() if v] == ["train"]
    exporter.phase_advanced(3, "train", 1)
    assert progress() > started
    exporter.phase_started(4, "my_phase", None, "")
    assert [p for p, v in phases().items() if v] == ["train", "my_phase"], "side by side"
    exporter.phase_finished(4, "my_phase", 1.0)
    assert [p for p, v in phases().items() if v] == ["train"]
    exporter.phase_finished(3, "train", 1.0)
    assert set(phases().values()) == {0.0}
    found = scrape(exporter)
    assert found["onlinerl_iteration", ()] == 4.0
    assert ("onlinerl_iteration_end_timestamp_seconds", ()) not in found, "1970 is not when an iteration ended"
    exporter.phase_finished(3, "commit", 0.1)
    assert scrape(exporter)["onlinerl_iteration_end_timestamp_seconds", ()] > started


def test_a_taken_port_makes_way_for_the_next_one(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = PrometheusTracker("demo", port=port)
        assert port < second.port < port + 100
        assert scrape(second)["onlinerl_run_state", (("state", "running"),)] == 1.0
        second.close()
        monkeypatch.setattr("onlinerl.trackers.prometheus.PORTS", 1)
        with pytest.raises(ConfigError, match="in use") as caught:
            PrometheusTracker("demo", port=port)
    assert caught.value.field == "metrics.prometheus_port"
    assert "another port" in caught.value.fix


def test_a_foreign_address_is_explained():
    with pytest.raises(ConfigError, match="cannot listen") as caught:
        PrometheusTracker("demo", host="192.0.2.1", port=0)
    assert caught.value.field == "metrics.prometheus_host"


def test_no_host_is_every_address_of_this_machine():
    Prometheus(host="", port=0).check()
    tracker = PrometheusTracker("demo", host="", port=0)
    assert scrape(tracker)["onlinerl_run_state", (("state", "running"),)] == 1.0
    tracker.close()


def discovered(folder: Path) -> list:
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("state", ["finished", "failed", "interrupted"])
def test_prometheus_finds_a_run_and_learns_how_it_ended(state, tmp_path):
    folder = tmp_path / ".prometheus"
    (folder).mkdir()
    (folder / "demo.prom").write_text("what an earlier attempt left\n")
    tracker = PrometheusTracker("demo", port=0, discovery=folder)
    entry = {"targets": [f"127.0.0.1:{tracker.port}"], "labels": {"run": "demo", "run_state": "running"}}
    assert discovered(folder) == [[entry]]
    assert not (folder / "demo.prom").exists()
    tracker.log([metric("weight_sync_ok", 0.0)])
    tracker.ended(state)
    tracker.close()
    kept = {family.name: family for family in text_string_to_metric_families((folder / "demo.prom").read_text())}
    assert [s.labels["state"] for s in kept["onlinerl_run_state"].samples if s.value] == [state]
    assert ("onlinerl_weight_sync_ok" in kept) == (state != "finished"), "the figures of a finished run are no news"
    assert discovered(folder) == ([] if state == "finished" else [[entry | {"labels": {"run": "demo", "run_state": state}}]])
    assert not [p for p in folder.iterdir() if p.suffix not in (".json", ".prom")]


def test_a_run_that_listens_everywhere_is_found_at_an_address_of_this_machine(tmp_path):
    tracker = PrometheusTracker("demo", host="0.0.0.0", port=0, discovery=tmp_path, advertised="192.0.2.7")
    tracker.close()
    assert discovered(tmp_path)[0][0]["targets"] == [f"192.0.2.7:{tracker.port}"]


def test_a_folder_that_cannot_be_written_is_explained_and_the_port_given_back(tmp_path):
    (tmp_path / "file").write_text("")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        PrometheusTracker("demo", port=port, discovery=tmp_path / "file" / ".prometheus")
    assert caught.value.field == "runs"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_the_port_is_free_again_after_close():
    first = PrometheusTracker("demo", port=0)
    first.close()
    PrometheusTracker("demo", port=first.port).close()


# --- tensorboard ---


def test_tensorboard_holds_the_values(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorboardTracker(tmp_path)
    tracker.log([metric("kl_ref", 1.5, iteration=2, labels={"estimator": "k3"}), metric("loss", 0.5, labels={"step": "40"})])
    tracker.log([metric("reward", 0.25, ci_low=0.125, ci_high=0.5)])
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()

    def points(tag):
        return [(e.step, e.value) for e in events.Scalars(tag)]

    assert points("kl_ref/estimator=k3") == [(2, 1.5)]
    assert points("loss") == [(40, 0.5)]
    assert points("reward/low") + points("reward") + points("reward/high") == [(1, 0.125), (1, 0.25), (1, 0.5)]


def test_without_tensorboard_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ConfigError, match="TensorBoard") as caught:
        TensorboardTracker(tmp_path)
    assert caught.value.field == "metrics.tensorboard"
    assert "onlinerl[tensorboard]" in caught.value.fix


# --- console ---


def test_plain_lines_when_there_is_no_terminal(monkeypatch):
    out = io.StringIO()
    drive(ConsoleTracker(Console(file=out)))
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "hello [bold] /a/path"
    assert lines[1].split() == ["iteration", "1", "sample", "2.0", "s", "3", "prompts", "1.5", "prompts/s"]
    assert lines[2].split() == ["iteration", "1", "train", "1.0", "s"]
    assert len(lines) == 3  # figures are for the other trackers; people get a note


def test_a_long_phase_reports_without_a_terminal(monkeypatch):
    monkeypatch.setattr(console_module, "QUIET_S", 0.0)
    out = io.StringIO()
    tracker = ConsoleTracker(Console(file=out))
    tracker.phase_started(1, "sample", 8, "prompts")
    tracker.phase_advanced(1, "sample", 3)
    assert out.getvalue().split() == ["iteration", "1", "sample", "3", "of", "8", "prompts", "after", "0", "s"]


def test_a_terminal_shows_bars_and_keeps_one_line_per_phase():
    out = io.StringIO()
    drive(ConsoleTracker(Console(file=out, force_terminal=True, width=120)))
    assert "3/4" in out.getvalue()
    assert "prompts/s" in out.getvalue()
    assert "iteration 1  sample           2.0 s         3 prompts  1.5 prompts/s" in out.getvalue()


def row(iteration, **more):
    base = dict.fromkeys(("reward", "kl_ref", "kl_prev", "win_rate", "sync", "samples", "oracle_calls"))
    return {"iteration": iteration, **base, "phases": {}, "status": "unfinished", **more}


@pytest.mark.parametrize(("label_s", "shown"), [(0.1, "123 247"), (12.3, "123 12 247")])
def test_the_table_fits_a_narrow_terminal(label_s, shown):
    phases = dict.fromkeys(NAMES, 123.4) | {"label": label_s, "commit": 0.1}
    rate = {"value": 0.61, "low": 0.51, "high": 0.7, "n": 100}
    out = io.StringIO()
    full = row(10, reward=-0.512, kl_ref=123.45, win_rate=rate, length=1234.5, phases=phases, status="promoted")
    Console(file=out, width=80).print(render_table({"run": "demo", "algorithm": "dpo", "iterations": [full]}))
    assert "…" not in out.getvalue()
    assert f"10 -0.512 123.45 0.61 [0.51, 0.70] 1234.5 {shown} 123 123 247" in " ".join(out.getvalue().split())


def test_the_table_of_iterations():
    rate = {"value": 0.61, "low": 0.51, "high": 0.7, "n": 100}
    done = row(1, reward=0.5, kl_ref=1.25, win_rate=rate, length=20.0, phases={"sample": 1.0, "train": 3.04}, status="promoted")
    out = io.StringIO()
    Console(file=out, width=140).print(render_table({"run": "demo", "algorithm": "dpo", "iterations": [row(0), done]}))
    text = out.getvalue()
    for expected in (
        "demo (dpo)",
        "KL base",
        "0.61 [0.51, 0.70]",
        "1.25",
        "20.0",
        "sample",
        "train",
        "iteration 0 is unfinished",
    ):
        assert expected in text
    render_table({"run": "demo", "algorithm": None, "iterations": []})


def test_the_table_says_what_its_figures_are_worth():
    def table(**more) -> str:
        out = io.StringIO()
        rows = [row(1, **{"kl_ref": 1.25, "status": "promoted", **more})]
        Console(file=out, width=140).print(render_table({"run": "demo", "algorithm": "dpo", "iterations": rows}))
        return " ".join(out.getvalue().split())

    sure = table(kl_estimator="k3", kl_conflict=False, insufficient=[])
    assert "1.25 -" in sure
    assert "too few" not in sure
    assert "disagree" not in sure
    doubtful = table(kl_estimator="k1", kl_conflict=True, insufficient=["kl_ref", "reward", "entropy_seq"])
    assert "1.25 k1! " in doubtful
    assert "too few prompts to decide by: reward, KL" in doubtful
    assert "k1: there k3 is the noisier estimate" in doubtful
    assert "the two estimates of the KL disagree" in doubtful
    assert "iteration 1 gave nothing to learn" in table(status="keep")


# --- the dashboard file ---


def test_the_dashboard_is_what_its_generator_writes(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_grafana", DASHBOARDS / "make_grafana.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look for their module there
    spec.loader.exec_module(module)
    assert (DASHBOARDS / "onlinerl.json").read_text() == module.text(), "run python dashboards/make_grafana.py"
    ids = [panel["id"] for panel in module.dashboard()["panels"]]
    assert len(ids) == len(set(ids))
