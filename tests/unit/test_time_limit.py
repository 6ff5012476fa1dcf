"""A time limit that a phase cannot fit into is said, and not run into for ever."""

from __future__ import annotations

import pytest
from values import group, groups, label

from onlinerl.controller import time_limit
from onlinerl.controller.time_limit import VARIABLE, PhaseClock, Place
from onlinerl.errors import ConfigError
from onlinerl.graph import NAMES
from onlinerl.stores import _tables
from onlinerl.stores.directory import RunDirectory


class Run:
    """What is finished, and how many rows each iteration has on disk."""

    def __init__(self, *iterations, stopped=None, rows=()):
        self.iterations, self.rows = list(iterations), dict(rows)
        self.manifest = {} if stopped is None else {"stopped": stopped}

    def phases(self, iteration):
        return self.iterations[iteration] if iteration < len(self.iterations) else {}

    def rows_from(self, iteration):
        return sum(rows for number, rows in self.rows.items() if number >= iteration)


def done(*phases, seconds=1.0):
    return {phase: {"seconds": seconds} for phase in phases}


FIRST = done("sync", "answer", "measure", "commit")


def test_a_run_stands_at_its_first_unfinished_phase():
    assert Place.of(Run()) == Place(iteration=0, phase="sync", rows=0)
    assert Place.of(Run(done("sync"))).phase == "answer"
    assert Place.of(Run(FIRST)).phase == "sample"
    assert Place.of(Run(FIRST, done("sample", "label", "annotate", "train"))).phase == "train"
    assert Place.of(Run(FIRST, done("sample"), rows={0: 2, 1: 7})) == Place(iteration=1, phase="label", rows=7)


def test_a_journal_that_becomes_a_part_is_no_progress_and_a_row_is(tmp_path, monkeypatch):
    """It is smaller then, and holds the same."""
    manifest = {"name": "r", "config_digest": "abc", "fingerprint": {}}
    with RunDirectory.create(tmp_path / "r", config_yaml="", manifest=manifest) as run:
        for phase in FIRST:
            run.finish_phase(0, phase, {"seconds": 1.0})
        folder = run.path / "iterations/0001"

        def size() -> int:
            return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

        def again() -> Place:
            """What the next attempt sees."""
            return Place.of(RunDirectory(run.path, run._lock))

        table = run.groups(1, "rollouts")
        for one in groups(20, tokens=300):
            table.append([one])
        before = size()
        assert Place.of(run) == again() == Place(iteration=1, phase="sample", rows=20)
        monkeypatch.setattr(_tables, "PART_BYTES", 1)
        table.append([group(20)])
        assert size() < before
        assert Place.of(run) == again() == Place(iteration=1, phase="sample", rows=21)
        run.update_manifest(stopped={**PhaseClock(run).stopped(), "seconds": 1000.0})
        table.seal()
        with pytest.raises(ConfigError, match="sample of iteration 1 was stopped after 1000 s"):
            time_limit.check(run, 900)
        run.labels(1, "verdicts").append([label(0, 1.0)])
        assert time_limit.check(run, 900)
        assert again().rows == 22


def test_the_clock_counts_the_phase_and_one_start_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    run = Run(FIRST, done("sample"))
    clock = PhaseClock(run)
    clock.phase_started(0, "start", None, "")
    now[0] += 30
    assert clock.stopped()["seconds"] == 30, "stopped while it started"
    clock.phase_started(1, "label", 4, "groups")
    now[0] += 10
    assert clock.stopped() == {"iteration": 1, "phase": "label", "rows": 0, "seconds": 40.0}
    run.iterations[1] |= done("label")
    clock.phase_finished(1, "label", 10.0)
    now[0] += 7
    clock.phase_finished(1, "checking", 7.0)  # only a part of a phase
    now[0] += 5
    assert clock.stopped() == {"iteration": 1, "phase": "annotate", "rows": 0, "seconds": 30 + 12.0}


def stopped(phase="train", iteration=1, rows=0, seconds=1000.0):
    return {"iteration": iteration, "phase": phase, "rows": rows, "seconds": seconds}


def test_a_phase_that_was_given_as_much_time_before_is_refused():
    here = FIRST, done("sample", "label", "annotate")
    with pytest.raises(ConfigError, match="train of iteration 1 was stopped after 1000 s") as caught:
        time_limit.check(Run(*here, stopped=stopped()), 1050)
    assert caught.value.field == VARIABLE
    assert "longer time limit" in caught.value.fix


def test_a_phase_may_be_tried_again_when_that_can_help():
    here = FIRST, done("sample", "label", "annotate")
    assert time_limit.check(Run(*here, stopped=stopped()), 1200), "there is more time"
    assert time_limit.check(Run(*here, stopped=stopped(iteration=0, phase="sync")), 10), "that one is over"
    assert time_limit.check(Run(*here, stopped=stopped(seconds=20)), 1000), "it was stopped early: a preemption"
    assert time_limit.check(Run(FIRST, stopped=stopped("sample"), rows={1: 3}), 1000), "part of it is on disk"
    older = {"iteration": 1, "phase": "sample", "kept": 0, "seconds": 1000.0}
    assert time_limit.check(Run(FIRST, stopped=older), 1000), "counted by another measure, which proves nothing"
    with pytest.raises(ConfigError, match="sample of iteration 1"):
        time_limit.check(Run(FIRST, stopped=stopped("sample")), 1000)


def test_what_was_sampled_meanwhile_is_progress():
    """With lag a push waits for the sampling of the next iteration, which keeps what it has; a training that begins again does not."""
    here = FIRST, done("sample", "label", "annotate", "train", "checkpoint")
    rows = {1: 7, 2: 3}
    assert Place.of(Run(*here, rows=rows)) == Place(iteration=1, phase="sync", rows=3), "a push goes on from nothing of its own"
    assert time_limit.check(Run(*here, rows=rows, stopped=stopped("sync", rows=2)), 1000)
    with pytest.raises(ConfigError, match="sync of iteration 1 was stopped"):
        time_limit.check(Run(*here, rows=rows, stopped=stopped("sync", rows=3)), 1000)


def test_a_phase_that_took_longer_in_an_earlier_iteration_is_said():
    whole = done(*NAMES, seconds=3000.0) | done("train", seconds=500.0)
    notes = time_limit.check(Run(FIRST, whole), 1000)
    assert notes[0] == "time limit: 1000 s"
    assert [note.split(":")[1].split()[0] for note in notes[1:]] == ["checkpoint", "sync", "commit"]
    assert len(time_limit.check(Run(FIRST, whole), 4000)) == 1


def test_the_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert time_limit.given() is None
    monkeypatch.setenv(VARIABLE, "90")
    assert time_limit.given() == 90.0
    for text in ("soon", "nan"):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ConfigError, match="no number"):
            time_limit.given()


def test_a_run_stopped_in_training_does_not_repeat_it_in_the_same_time(toy_config, warm_cli, tmp_path):
    """The command line, stopped inside `train` by a signal: refused with the same limit, finished with a longer one."""
    config, log = toy_config(tmp_path, iterations=1), tmp_path / "log"
    process, out = warm_cli.start("run", config, log=log, wait=["step", 1])
    warm_cli.wait_for(log, "waiting")
    process.terminate()
    assert warm_cli.finish(process, out).returncode == 75
    run = tmp_path / "runs" / "toy"
    again = warm_cli("resume", run, env={VARIABLE: "0.01"})
    assert again.returncode == 2, "no launcher repeats this"
    assert "error: config: ONLINERL_TIME_LIMIT_S: train of iteration 1 was stopped after" in again.stderr
    longer = warm_cli("resume", run, env={VARIABLE: "100000"})
    assert longer.returncode == 0, longer.message
    assert "time limit: 100000 s" in longer.stdout
