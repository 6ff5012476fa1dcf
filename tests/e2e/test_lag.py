"""`schedule.max_lag: 1`: an iteration is sampled while the one before it trains, by one version, and a kill changes nothing."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_runs import BATCH, COUNTED, HELDOUT, PROBE, PROMPTS, events, everything, unpaid, weights

from onlinerl.controller.phases import annotate
from onlinerl.engines.toy import ToyEngine
from onlinerl.errors import EngineError
from onlinerl.graph import NAMES
from onlinerl.learners.toy import ToyLearner, ToySync
from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics

FAILED, NOTHING_LEFT, KILLED = 1, 4, -signal.SIGKILL
PATIENCE_S = 60
ITERATIONS = 4
PHASES, SIDE_BY_SIDE = NAMES, ("schedule.stream=true", "schedule.evaluate_beside=true")
SAMPLED_BY = {1: 0, 2: 0, 3: 1, 4: 2}
LAGGED = {"schedule.stream": True, "schedule.evaluate_beside": True, "schedule.max_lag": 1, "iterations": ITERATIONS}
TABLES = ("rollouts", "verdicts", "logprobs", "pairs", "evaluation", "evaluation_verdicts")


def tables(run: Path) -> dict:
    """Every row of every iteration but for what it cost, in an order of its own: they are kept as they arrived."""
    with RunDirectory.open(run) as opened:
        return {
            (t, table): sorted(json.dumps(unpaid(row)) for row in opened.read(t, table))
            for t in range(ITERATIONS + 1)
            for table in TABLES
        }


def all_of(run: Path) -> dict:
    return everything(run, ITERATIONS) | {"tables": tables(run)}


@pytest.fixture(scope="module")
def straight(toy_config, warm_cli_in, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = warm_cli_in(folder)("run", toy_config(folder, COUNTED | LAGGED), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


@pytest.fixture(scope="module")
def uninterrupted(straight):
    """What it reports, and what it keeps."""
    return all_of(straight / "runs/toy")


def test_each_iteration_is_sampled_by_one_version_which_is_recorded(straight):
    run = straight / "runs/toy"
    with RunDirectory.open(run) as opened:
        for t, version in SAMPLED_BY.items():
            assert {v for row in opened.read(t, "rollouts") for v in row["policy_versions"]} == {version}
            assert {v for row in opened.read(t, "evaluation") for v in row["policy_versions"]} == {t}
            records = opened.phases(t)
            assert records["sample"]["policy_version"] == version
            assert (records["train"]["sampled_by"], records["train"]["policy_version"]) == ([version], t - 1)
    staleness = [(r["iteration"], r["value"]) for r in read_metrics(run / "metrics.jsonl") if r["name"] == "staleness"]
    assert staleness == [(t, t - 1 - version) for t, version in SAMPLED_BY.items() for _ in ("mean", "p95", "max")]
    assert [e["version"] for e in events(straight / "log") if e["kind"] == "push"] == [0, 1, 2, 3, 4]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


def test_log_probs_are_those_of_the_right_weights(toy_config, warm_cli, tmp_path):
    """`behavior_logprobs` of the version that sampled, `old_logprobs` of what training starts from: the gap is corrected for."""
    done = warm_cli("run", toy_config(tmp_path, LAGGED | {"algorithm.name": "grpo", "training.epochs": 2}))
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    iterates = [np.zeros_like(weights(run, 1)), *(weights(run, t) for t in range(1, ITERATIONS + 1))]
    differ = 0.0
    with RunDirectory.open(run) as opened:
        for t, version in SAMPLED_BY.items():
            old = {row["prompt_id"]: row["old_logprobs"] for row in opened.read(t, "logprobs")}
            for row in opened.read(t, "rollouts"):
                for tokens, behavior, ours in zip(row["token_ids"], row["logprobs"], old[row["prompt_id"]], strict=True):
                    assert behavior == pytest.approx(log_softmax(iterates[version])[tokens], abs=1e-5)
                    assert ours == pytest.approx(log_softmax(iterates[t - 1])[tokens], abs=1e-5)
                    differ = max(differ, float(np.abs(np.subtract(behavior, ours)).max()))
    assert differ > 0.05, "there was something to correct for"


@pytest.mark.parametrize("algorithm", ["dpo", "grpo", "ppo", "sppo"])
def test_what_runs_side_by_side_changes_nothing(toy_config, warm_cli, tmp_path, algorithm):
    """The lag alone says what is computed; judging and scoring may follow or wait."""
    seen = []
    for name, schedule in (("beside", {}), ("turns", {"schedule.stream": False, "schedule.evaluate_beside": False})):
        keys = LAGGED | {"algorithm.name": algorithm, **schedule}
        done = warm_cli("run", toy_config(tmp_path, keys, name=name, file=f"{name}.yaml"))
        assert done.returncode == 0, done.message
        found = all_of(tmp_path / "runs" / name)
        found["figures"].pop("run")
        for row in found["figures"]["iterations"]:
            row["phases"] = sorted(row["phases"])
        seen.append(found)
    assert seen[0] == seen[1]


# --- killed and resumed ---

TURNS = ("schedule.stream=false", "schedule.evaluate_beside=false")
# The event during which the first process is killed: about in the middle of the run, where two phases and more are under way.
INSIDE = {
    "sample": ["generate", 2 * HELDOUT + 2 * PROMPTS + 5],
    "label": ["judge", 12],
    "annotate": ["logprobs", 9],
    "train": ["step", 5],
    "checkpoint": ["save", 3],
    "sync": ["push", 3],
    "answer": ["generate", 3 * HELDOUT + 4 * PROMPTS - 3],
    "measure": ["judge", 17],
    "commit": ["retain", 3],
}


@pytest.mark.parametrize(
    ("phase", "schedule"), [*((phase, ()) for phase in PHASES), *((phase, TURNS) for phase in ("sample", "sync"))]
)
def test_killed_in_every_phase(toy_config, warm_cli, uninterrupted, tmp_path, phase, schedule):
    """In its middle, when its work is done but not recorded, and when it is recorded: nothing is lost, and at each kill no more is
    asked for again than what was in the works."""
    config, run, log = toy_config(tmp_path, COUNTED | LAGGED), tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", config, *schedule, log=log, kill=INSIDE[phase]).returncode == KILLED
    assert warm_cli("resume", run, log=log, kill=[f"before 3 {phase}", 1]).returncode in (0, KILLED)
    done = warm_cli("resume", run, log=log, kill=[f"after 3 {phase}", 1])
    assert done.returncode in (0, KILLED, NOTHING_LEFT), done.message
    if done.returncode == KILLED:
        done = warm_cli("resume", run, log=log)
    assert done.returncode in (0, NOTHING_LEFT), done.message
    check_counts(log, kills=3)
    found, expected = all_of(run), copy.deepcopy(uninterrupted)
    for row in (*found["figures"]["iterations"], *expected["figures"]["iterations"]):
        row["phases"].sort()  # they end in another order
    assert found == expected


def test_an_iteration_that_gives_nothing_to_learn(straight, toy_config, warm_cli, tmp_path):
    """It is committed without a step; the one that is sampled beside it and the one that is sampled from it lag as always, and a kill
    in each phase changes nothing."""
    with RunDirectory.open(straight / "runs/toy") as opened:
        tied = [row["prompt"] for row in opened.read(2, "rollouts")]
    config = toy_config(tmp_path, COUNTED | LAGGED)
    killed, kept = tmp_path / "runs/toy", tmp_path / "runs/kept"
    done = warm_cli("run", config, log=tmp_path / "log", tied=tied)
    assert done.returncode == 0, done.message
    killed.rename(kept)
    expected = all_of(kept)
    assert [row["status"] for row in expected["figures"]["iterations"]] == [
        "promoted",
        "promoted",
        "keep",
        "promoted",
        "promoted",
    ]
    assert expected["weights"][1] == expected["weights"][0] != expected["weights"][2]
    with RunDirectory.open(kept) as opened:
        for t, version in SAMPLED_BY.items():
            assert {v for row in opened.read(t, "rollouts") for v in row["policy_versions"]} == {version}
            assert opened.phases(t)["train"]["steps"] == (0 if t == 2 else 2)

    for command, phase in zip(["run", *["resume"] * (len(PHASES) - 1)], PHASES, strict=True):
        done = warm_cli(
            command, config if command == "run" else killed, log=tmp_path / "log", tied=tied, kill=[f"before 2 {phase}", 1]
        )
        assert done.returncode == KILLED, done.message
    done = warm_cli("resume", killed, log=tmp_path / "log", tied=tied)
    assert done.returncode == 0, done.message
    found = all_of(killed)
    for row in (*found["figures"]["iterations"], *expected["figures"]["iterations"]):
        row["phases"].sort()  # they end in another order
    assert found == expected


def check_counts(log: Path, kills: int) -> None:
    """What engine and oracle were asked for, as they counted it."""
    happened = events(log)
    generated = Counter((e["prompt"], *e["seeds"], e["version"]) for e in happened if e["kind"] == "generate")
    asked = [one for e in happened if e["kind"] == "judge" for one in e["asked"] if one[1:] != PROBE]
    expected = ITERATIONS * PROMPTS + (ITERATIONS + 1) * HELDOUT
    assert len(generated) == expected, "a prompt was sampled by another version too"
    assert sum(generated.values()) <= expected + kills * 2, "at each kill one prompt of two phases may be in the works"
    assert len(asked) <= expected + kills * 2 * BATCH, "at each kill one call of two phases may be in the works"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_lagged_sampling_phase_ends_with_the_version_that_it_began_with(
    toy_config, onlinerl, warm_cli, uninterrupted, tmp_path, monkeypatch, keep
):
    """The learner has version 2 on disk already while version 1 still samples: a resume gives the engine version 1 first, proved, and
    then the learner its own weights."""
    run = tmp_path / "runs/toy"
    record = run / "iterations/0002"

    def generate(self, requests, sampling, original=ToyEngine.generate):
        requests = list(requests)
        lagged = self.version == 1 and len(requests[0].seeds) > 1
        for i, [group] in enumerate(original(self, requests, sampling)):
            if lagged and i == len(requests) - 2:
                assert wait_for(lambda: "checkpoint" in phases_of(record)), "iteration 2 did not train beside it"
                raise EngineError("planted", fix="none")
            yield [group]

    with monkeypatch.context() as planted:
        planted.setattr(ToyEngine, "generate", generate)
        config = toy_config(tmp_path, {**COUNTED, **LAGGED, "oracle.function": "hooks.judge", "checkpoints.keep": keep})
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))
        import hooks

        planted.setitem(hooks.SPEC, "log", os.devnull)
        code, message = onlinerl("run", config)
    assert code == FAILED, message
    with RunDirectory.open(run) as opened:
        assert {"checkpoint"} <= {*opened.phases(2)}
        assert "sync" not in opened.phases(2)
        assert 0 < len(opened.read(3, "rollouts")) < PROMPTS
    log = tmp_path / "log"
    done = warm_cli("resume", run, log=log)
    assert done.returncode == 0, done.message
    happened = events(log)
    assert [e["version"] for e in happened if e["kind"] == "push"] == [1, 2, 3, 4]
    again = [e for e in happened if e["kind"] == "generate" and e["version"] == 1 and len(e["seeds"]) > 1]
    assert len(again) == 2, "only what was missing"
    assert all_of(run)["tables"] == uninterrupted["tables"]
    assert everything(run, ITERATIONS)["weights"] == uninterrupted["weights"]


def phases_of(folder: Path) -> str:
    file = folder / "manifest.json"
    return file.read_text() if file.exists() else ""


def wait_for(condition) -> bool:
    for _ in range(20 * PATIENCE_S):
        if condition():
            return True
        threading.Event().wait(0.05)
    return False


def test_more_iterations_make_the_run_that_had_always_been_asked_for(toy_config, warm_cli, uninterrupted, tmp_path):
    run, log = tmp_path / "runs/toy", tmp_path / "log"
    assert (
        warm_cli("run", toy_config(tmp_path, COUNTED | LAGGED | {"iterations": 2, "checkpoints.keep": 1}), log=log).returncode
        == 0
    )
    assert warm_cli("resume", run, log=log).returncode == NOTHING_LEFT
    done = warm_cli("resume", run, "iterations=4", "checkpoints.keep=2", log=log)
    assert done.returncode == 0, done.message
    assert [e["version"] for e in events(log) if e["kind"] == "push"] == [0, 1, 2, 1, 2, 3, 4]
    check_counts(log, kills=0)
    found = all_of(run)
    assert found["tables"] == uninterrupted["tables"]
    assert found["weights"] == uninterrupted["weights"]


def test_the_lag_of_a_run_is_not_changed_by_a_resume(toy_config, warm_cli, tmp_path):
    assert warm_cli("run", toy_config(tmp_path, iterations=1)).returncode == 0
    refused = warm_cli("resume", tmp_path / "runs/toy", "iterations=2", "schedule.max_lag=1")
    assert refused.returncode == 2, refused.message
    assert "schedule.max_lag: was 0 when the run started and is now 1" in refused.stderr
    assert warm_cli("resume", tmp_path / "runs/toy", "iterations=2", *SIDE_BY_SIDE).returncode == 0


# --- the checks can still fail ---


def test_the_self_test_fails_on_log_probs_that_are_not_the_policy_s(toy_config, onlinerl, tmp_path, monkeypatch):
    def logprobs(self, sequences, original=ToyLearner.logprobs, **options):
        return [logprobs + 0.1 for logprobs in original(self, sequences, **options)]

    monkeypatch.setattr(annotate, "STREAMED", 2)
    monkeypatch.setattr(ToyLearner, "logprobs", logprobs)
    code, message = onlinerl("run", toy_config(tmp_path, LAGGED | {"algorithm.name": "grpo"}))
    assert code == FAILED
    assert "before the first step, the stored old_logprobs differ" in message


def test_an_engine_that_keeps_old_weights_is_noticed(toy_config, onlinerl, tmp_path, monkeypatch):
    """It says that it has the new version, and the proof of delivery is blind: the log-probs of its answers are not the learner's. What
    is sampled for training with lag is not compared like this, because its version differs from the learner's as it should."""

    def load(self, logits, version):
        self.version = version

    monkeypatch.setattr(ToyEngine, "load", load)
    blind = SimpleNamespace(**vars(np) | {"array_equal": lambda *arrays: True})  # only for the push: others compare arrays too
    monkeypatch.setattr("onlinerl.learners.toy.np", blind)
    code, message = onlinerl("run", toy_config(tmp_path, LAGGED))
    assert code == FAILED
    assert "engine and learner differ by" in message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        assert "measure" not in run.phases(1)


def test_a_push_beside_a_sampling_phase_would_be_noticed(toy_config, onlinerl, tmp_path, monkeypatch):
    """The fault that the edges of the graph are there for: the version changes under a phase that samples."""

    def generate(self, requests, sampling, original=ToyEngine.generate):
        for i, [group] in enumerate(original(self, requests, sampling)):
            if i == 2 and self.version == 1 and len(group.rollouts) > 1:
                self.version = 2
            yield [group]

    monkeypatch.setattr(ToyEngine, "generate", generate)
    code, message = onlinerl("run", toy_config(tmp_path, LAGGED))
    assert code == FAILED
    assert "sampled by version 2, expected 1" in message


def test_lag_needs_no_other_parts(toy_config, onlinerl, tmp_path, monkeypatch):
    """The pushes that a run with lag makes are those of one without: no more, and in the same order."""
    pushed = {0: [], 1: []}
    for lag in (0, 1):
        with monkeypatch.context() as counted:

            def push(self, version, model="policy", original=ToySync.push, lag=lag):
                pushed[lag].append(version)
                return original(self, version, model)

            counted.setattr(ToySync, "push", push)
            code, message = onlinerl("run", toy_config(tmp_path, LAGGED | {"schedule.max_lag": lag, "name": f"lag{lag}"}))
        assert code == 0, message
    assert pushed[0] == pushed[1] == [0, 1, 2, 3, 4]
