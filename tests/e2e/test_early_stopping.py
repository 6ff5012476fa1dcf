"""`training.target_kl` in whole runs of the toy engine and learner: which steps are left out, what is said of it, and what a kill changes."""

from __future__ import annotations

import math
import signal

import numpy as np
import pytest
from toy_runs import COUNTED, everything, weights

from onlinerl.learners.toy import ToyLearner
from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics

KILLED = -signal.SIGKILL
TARGET = 0.05
MANY = {"training.epochs": 4}
"""Eight steps a pass of dpo, of which a few bring the policy beyond TARGET."""
INSIDE = [["step", 1], ["step", 5], ["before 2 train", 1], ["after 2 train", 1], ["before 3 checkpoint", 1]]


@pytest.fixture
def reports(monkeypatch):
    """What the learner reported, pass by pass."""
    found: list[list] = []

    def update(self, steps, rates, original=ToyLearner.update, **more):
        found.append([])
        for report in original(self, steps, rates, **more):
            found[-1].append(report)
            yield report

    monkeypatch.setattr(ToyLearner, "update", update)
    return found


def of_steps(run, name: str) -> list[float]:
    return [m["value"] for m in read_metrics(run / "metrics.jsonl") if m["name"] == name]


@pytest.mark.parametrize(("algorithm", "passes"), [("dpo", 1), ("grpo", 1), ("onpo", 2)])
def test_steps_end_where_the_policy_is_too_far_from_where_they_began(
    toy_config, onlinerl, reports, tmp_path, algorithm, passes
):
    overrides = {"algorithm.name": algorithm, "training.target_kl": TARGET, "metrics.prometheus": False} | MANY
    code, message = onlinerl("run", toy_config(tmp_path, overrides))
    assert code == 0, message
    run = tmp_path / "runs/toy"
    assert len(reports) == 3 * passes
    for one in reports:
        kls = [report.metrics[0]["kl_old"] for report in one]
        assert kls[0] == pytest.approx(0.0, abs=1e-6), "each iteration, and each pass, is measured from its own start"
        assert max(kls[:-1]) <= TARGET < kls[-1]
        assert [report.stopped for report in one] == [0] * (len(one) - 1) + [1]
    with RunDirectory.open(run) as opened:
        for t in (1, 2, 3):
            record = opened.phases(t)["train"]
            of_iteration = reports[passes * (t - 1) : passes * t]
            assert record["steps"] == sum(len(one) - 1 for one in of_iteration)
            planned = math.ceil(record["items"] / 4) * MANY["training.epochs"] * passes
            assert record["stopped"] == planned - record["steps"] > 0
            assert record["tokens"] == sum(report.tokens for one in of_iteration for report in one)
        stopped = [float(opened.phases(t)["train"]["stopped"]) for t in (1, 2, 3)]
    assert of_steps(run, "stopped_steps") == stopped
    assert max(of_steps(run, "kl_old")) <= TARGET


def test_the_weights_that_training_starts_from_are_asked_though_the_loss_does_not_read_them(toy_config, onlinerl, tmp_path):
    """Of a reference that stays the base model they are another model's; without a target nobody asks them."""
    for name, target in (("with", TARGET), ("without", None)):
        overrides = {"name": name, "training.target_kl": target, "metrics.prometheus": False} | MANY
        code, message = onlinerl("run", toy_config(tmp_path, overrides))
        assert code == 0, message
        with RunDirectory.open(tmp_path / "runs" / name) as opened:
            rows = opened.read(3, "logprobs")
        asked = [row["old_logprobs"] for row in rows if row["reference_logprobs"] is not None]
        assert asked
        assert all((old is None) == (target is None) for old in asked)


def test_a_target_that_is_never_exceeded_changes_nothing(toy_config, onlinerl, tmp_path):
    for name, target in (("with", 1e9), ("without", None)):
        overrides = {"name": name, "training.target_kl": target, "metrics.prometheus": False} | MANY
        assert onlinerl("run", toy_config(tmp_path, overrides))[0] == 0
    for t in (1, 2, 3):
        assert np.array_equal(weights(tmp_path / "runs/with", t), weights(tmp_path / "runs/without", t))
    assert of_steps(tmp_path / "runs/with", "stopped_steps") == [0.0, 0.0, 0.0]
    assert of_steps(tmp_path / "runs/with", "kl_old")
    assert not of_steps(tmp_path / "runs/without", "kl_old")


@pytest.fixture(scope="module", params=["dpo", "onpo"])
def stopping(request):
    """Overrides of a run that stops early."""
    return COUNTED | MANY | {"algorithm.name": request.param, "training.target_kl": TARGET}


@pytest.fixture(scope="module")
def straight(stopping, toy_config, warm_cli_in, tmp_path_factory):
    """What a run reports that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = warm_cli_in(folder)("run", toy_config(folder, stopping), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "from where it began, more than training.target_kl" in " ".join(done.message.split())
    with RunDirectory.open(folder / "runs/toy") as opened:
        assert all(opened.phases(t)["train"]["stopped"] > 0 for t in (1, 2, 3))
    return everything(folder / "runs/toy")


@pytest.mark.parametrize("kill", INSIDE, ids=lambda kill: f"{kill[0]} {kill[1]}")
def test_killed_and_resumed_it_stops_at_the_same_step(stopping, straight, toy_config, warm_cli, tmp_path, kill):
    run, log = tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", toy_config(tmp_path, stopping), log=log, kill=kill).returncode == KILLED
    done = warm_cli("resume", run, log=log)
    assert done.returncode == 0, done.message
    assert everything(run) == straight


def test_a_target_is_part_of_what_is_computed(toy_config, onlinerl, tmp_path):
    overrides = {"iterations": 1, "training.target_kl": TARGET, "metrics.prometheus": False} | MANY
    assert onlinerl("run", toy_config(tmp_path, overrides))[0] == 0
    code, message = onlinerl("resume", tmp_path / "runs/toy", "iterations=2", "training.target_kl=0.2")
    assert code != 0
    assert "training.target_kl" in message
