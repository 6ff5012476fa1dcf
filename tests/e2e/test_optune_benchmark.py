"""benchmarks/optune.py: its arithmetic by hand, and its runs on toy parts, one of them killed before."""

from __future__ import annotations

import math
import re
import signal
import sys

import documents
import numpy as np
import pytest
from toy_runs import figures

from onlinerl.stores.directory import RunDirectory


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The program, which writes into a copy of the document."""
    monkeypatch.syspath_prepend(str(documents.ROOT / "benchmarks"))
    import optune

    (tmp_path / "results.md").write_text((documents.ROOT / "docs/results.md").read_text())
    monkeypatch.setattr(optune, "RESULTS", tmp_path / "results.md")
    return optune


@pytest.mark.parametrize(
    ("rates", "target", "expected"),
    [
        ([0.5, 0.7, 0.9], 0.7, 100.0),
        ([0.5, 0.7, 0.9], 0.8, 150.0),
        ([0.5, 0.7, 0.9], 0.55, 25.0),
        ([0.5, 0.9, 0.6], 0.9, 100.0),
        ([0.5, 0.4, 0.9], 0.7, 150.0),  # what fell is held at its highest
        ([0.5, 0.7, 0.9], 0.5, 0.0),
        ([0.5, 0.7, 0.9], 0.3, 0.0),
    ],
)
def test_what_a_win_rate_has_cost_is_read_off_straight_lines(benchmark, rates, target, expected):
    assert benchmark.reached([0, 100, 200], rates, target) == pytest.approx(expected)


def test_what_is_never_reached_has_no_cost(benchmark):
    assert math.isnan(benchmark.reached([0, 100], [0.5, 0.7], 0.8))


def curve(benchmark, responses, rates, tokens=10, prompts=20):
    """A run whose win rates are these; its tokens are so many per response."""
    wins = np.array([[1.0] * round(rate * prompts) + [0.0] * (prompts - round(rate * prompts)) for rate in rates])
    return benchmark.Curve(responses, [tokens * r for r in responses], wins)


def test_ratios_are_of_plain_dpo_to_the_other_at_the_rate_that_both_reach(benchmark):
    plain = curve(benchmark, [0, 100, 200], [0.5, 0.7, 0.9])
    other = curve(benchmark, [0, 100, 150], [0.5, 0.7, 0.8], tokens=12)
    goal = benchmark.target([plain, other])
    assert goal == pytest.approx(0.8)
    responses, tokens = benchmark.ratios(plain, other, goal)
    assert (responses, tokens) == (pytest.approx(1.0), pytest.approx(1500 / 1800))
    better = curve(benchmark, [0, 100, 150], [0.5, 0.8, 0.9])
    assert benchmark.ratios(plain, better, benchmark.target([plain, better]))[0] == pytest.approx(200 / 150)


def test_the_interval_is_of_the_held_out_prompts(benchmark):
    """Exact where all prompts say the same; around the ratio where they do not."""
    sure = curve(benchmark, [0, 100], [0.5, 1.0]), curve(benchmark, [0, 50], [0.5, 1.0])
    for one in sure:
        one.wins[0] = 0.5
    assert benchmark.interval({("dpo", 0): sure[0], ("optune", 0): sure[1]}, "optune", [0]) == (2.0, 2.0)
    pair = curve(benchmark, [0, 100, 200], [0.5, 0.7, 0.9]), curve(benchmark, [0, 100, 150], [0.5, 0.8, 0.9])
    pair[1].wins[:] = pair[1].wins[:, ::-1].copy()  # it wins on other prompts
    low, high = benchmark.interval({("dpo", 0): pair[0], ("optune", 0): pair[1]}, "optune", [0])
    assert low < 200 / 150 < high


def test_the_table_says_the_ratio_of_each_seed_and_its_spread(benchmark):
    found, minutes = {}, {}
    for seed, saved in ((0, 50), (1, 100)):
        found["dpo", seed] = curve(benchmark, [0, 100, 200], [0.5, 0.7, 0.9])
        found["optune", seed] = curve(benchmark, [0, 50, 200 - saved], [0.5, 0.7, 0.9])
        minutes |= {("dpo", seed): (2.0, 8.0), ("optune", seed): (1.5, 9.0)}
    lines = benchmark.report(found, minutes)
    assert (
        lines[2]
        == "| `optune` | 0 | 0.70, 0.90 (dpo 0.70, 0.90) | 0.90 | 150 | 200 | 1.33 | 1.33 | 1.5 (dpo 2.0) | 9.0 (dpo 8.0) |"
    )
    assert "dpo samples 1.67 times as many responses for the same win rate (lowest 1.33, highest 2.00; bootstrap" in lines[-1]
    benchmark.record(lines, [0, 1])
    assert lines[2] in benchmark.RESULTS.read_text()
    assert "Not measured yet: `make bench-optune`" not in benchmark.RESULTS.read_text()


def test_runs_are_started_resumed_and_read(benchmark, toy_config, warm_cli, tmp_path, monkeypatch, capsys):
    """Both arms have the same prompts; one that was killed goes on, and what is finished is only read."""
    arms = {arm: [f"iterations={2 + (arm != 'dpo')}", *keys[1:]] for arm, keys in benchmark.ARMS.items()}
    monkeypatch.setattr(benchmark, "ARMS", arms)
    config, folder = toy_config(tmp_path, {"metrics.prometheus": False}), tmp_path / "bench"
    benchmark.prepare(folder / "train-seed0.jsonl", config, [], 0)
    keys = {"name": "dpo-seed0", "runs": folder, "prompts.train": folder / "train-seed0.jsonl", "prompts.reuse": "true"}
    begun = [f"{key}={value}" for key, value in keys.items()]
    killed = warm_cli("run", config, *begun, "iterations=2", log=tmp_path / "log", kill=["step", 2])
    assert killed.returncode == -signal.SIGKILL

    def asked(*more):
        monkeypatch.setattr(sys, "argv", ["optune.py", "--config", str(config), "--runs", str(folder), "--seeds", "0", *more])
        return benchmark.main()

    monkeypatch.chdir(tmp_path)
    before = benchmark.RESULTS.read_text()
    assert asked() == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert re.search(r"\| `optune` \| 0 \| (0\.\d\d|1\.00), ", said), said
    assert benchmark.RESULTS.read_text() == before, "a try is not recorded"
    sampled = {}
    for arm in ("dpo", "optune"):
        with RunDirectory.open(folder / f"{arm}-seed0") as run:
            sampled[arm] = [[row["prompt_id"] for row in run.read(t, "rollouts")] for t in (1, 2)]
    assert {frozenset(ids) for arm in sampled.values() for ids in arm} == {frozenset(sampled["dpo"][0])}
    read = benchmark.read(folder / "optune-seed0")
    assert read.responses == [0, 32, 48, 64]
    rates = [row["win_rate"]["value"] for row in figures(folder / "optune-seed0")["iterations"][1:]]
    assert read.rates() == pytest.approx([0.5, *rates])

    def nothing_is_left(*_, **__):
        raise AssertionError("a finished run was started")

    monkeypatch.setattr(benchmark.subprocess, "run", nothing_is_left)
    assert asked() == 0
    assert capsys.readouterr().out == said


def test_figures_that_are_not_those_of_the_run_are_refused(benchmark, toy_config, warm_cli, tmp_path, monkeypatch):
    done = warm_cli("run", toy_config(tmp_path, {"iterations": 1, "metrics.prometheus": False}))
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    benchmark.read(run)
    said = benchmark.records(run)
    said[1]["measure"]["win_rate"]["value"] = 0.123
    monkeypatch.setattr(benchmark, "records", lambda _: said)
    with pytest.raises(SystemExit, match=r"0\.1230 as recorded"):
        benchmark.read(run)
