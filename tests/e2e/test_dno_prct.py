"""Answers of a teacher among the samples, pairs that come back, and the best iterate, on the toy engine and learner."""

from __future__ import annotations

import math
import signal
from collections import Counter

import numpy as np
import pytest
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything

from onlinerl.controller.phases.commit import best_iterate
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

ITERATIONS, K = 4, 4
ANSWER = "good great wonderful"
DNO = {
    **COUNTED,
    "algorithm.name": "dno_prct",
    "algorithm.teacher": True,
    "algorithm.teacher_max_share": 1.0,
    "algorithm.teacher_decay": 1.0,
    "algorithm.teacher_min_percentile": 0.0,
    "algorithm.margin": 0.2,
    "algorithm.margin_student": 0.1,
    "algorithm.replay": 0.3,
    "algorithm.replay_max_age": 2,
    "iterations": ITERATIONS,
    "checkpoints.exports": "best",
    "training.learning_rate": 0.05,
}
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("dno")
    done = warm_cli_in(folder)("run", toy_config(folder, DNO, answer=ANSWER), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "8 prompts x (4 samples + 1 teacher response)" in done.stdout
    return folder


def read(folder, t: int, table: str) -> list[dict]:
    with RunDirectory.open(folder / "runs/toy") as run:
        return run.read(t, table)


def records(folder, t: int) -> dict:
    with RunDirectory.open(folder / "runs/toy") as run:
        return run.phases(t)


def test_the_stored_answer_is_judged_with_the_samples_and_is_no_sample(whole):
    for t in range(1, ITERATIONS + 1):
        for row in read(whole, t, "rollouts"):
            assert row["sources"] == ["policy"] * K + ["teacher"]
            assert (row["texts"][K], row["policy_versions"][K]) == (ANSWER, -1)
            assert all(value is None or math.isnan(value) for value in row["logprobs"][K])
        assert records(whole, t)["sample"]["samples"] == PROMPTS * K
        assert records(whole, t)["train"]["sampled_by"] == [v for v in (t - 3, t - 2, t - 1) if v >= 0]
    asked = [one for e in events(whole / "log") if e["kind"] == "judge" for one in e["asked"]]
    assert sum(len(one) == 1 + K + 1 for one in asked) == ITERATIONS * PROMPTS
    assert sum(e["kind"] == "generate" for e in events(whole / "log")) == ITERATIONS * PROMPTS + (ITERATIONS + 1) * HELDOUT


def test_earlier_pairs_come_back_up_to_their_share_with_log_probs_of_the_present_reference(whole):
    assert records(whole, 1)["train"]["replayed"] == {}
    for t in range(2, ITERATIONS + 1):
        record = records(whole, t)["train"]
        new = record["items"] - sum(record["replayed"].values())
        expected = {str(age): int(share * new) for age, share in ((1, 0.3), (2, 0.15)) if age < t and int(share * new)}
        assert record["replayed"] == expected, "there were enough"
        again = read(whole, t, "replay_logprobs")
        assert Counter(t - int(row["prompt_id"].split("/")[0]) for row in again) == {int(a): n for a, n in expected.items()}
        then = {int(row["prompt_id"].split("/")[0]): row for row in again}
        for s, row in then.items():  # the same responses, scored by another reference
            first = {r["prompt_id"]: r for r in read(whole, s, "logprobs")}[row["prompt_id"].split("/")[1]]
            place = int(row["prompt_id"].split("/")[2])
            before, now = (
                np.concatenate(x) for x in (first["reference_logprobs"][2 * place : 2 * place + 2], row["reference_logprobs"])
            )
            assert len(before) == len(now)
            assert not np.array_equal(before, now)


@pytest.mark.parametrize(
    "moment", ["before 3 sample", "after 3 label", "after 3 annotate", "before 3 train", "after 3 train", "after 3 commit"]
)
def test_killed_and_resumed_it_is_the_same_run(whole, toy_config, warm_cli, tmp_path, moment):
    config = toy_config(tmp_path, DNO, answer=ANSWER)
    assert warm_cli("run", config, log=tmp_path / "log", kill=[moment, 1]).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    kept = {path.name for path in (tmp_path / "runs/toy/exports").iterdir()}
    assert kept == {path.name for path in (whole / "runs/toy/exports").iterdir()}
    for t in range(1, ITERATIONS + 1):
        assert records(tmp_path, t)["train"]["replayed"] == records(whole, t)["train"]["replayed"]
        assert read(tmp_path, t, "replay_logprobs") == read(whole, t, "replay_logprobs")
        assert records(tmp_path, t)["train"]["loss_last"] == records(whole, t)["train"]["loss_last"]
    assert (
        summarise(tmp_path / "runs/toy")["iterations"][-1]["reward"]
        == summarise(whole / "runs/toy")["iterations"][-1]["reward"]
    )


GUARDED = {key: value for key, value in DNO.items() if not key.startswith("algorithm.teacher_")} | {
    "algorithm.pair_weights": "age",
    "algorithm.token_weights": "differing",
    "algorithm.common_token_weight": 0.5,
    "algorithm.nll_coef": 0.1,
    "algorithm.nll_target": "reference_answer",
    "iterations": 3,
}


@pytest.fixture(scope="module")
def guarded(toy_config, warm_cli_in, tmp_path_factory):
    """A run whose teacher is held back, with weights of pairs and tokens and a likelihood of the stored answers."""
    folder = tmp_path_factory.mktemp("guarded")
    done = warm_cli_in(folder)("run", toy_config(folder, GUARDED, answer=ANSWER), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


def test_the_teacher_has_its_share_of_the_pairs_and_no_more(guarded):
    for t in range(1, 4):
        record = records(guarded, t)["train"]
        figures = record["figures"]
        taught = figures["teacher_won"] + figures["teacher_lost"]
        assert taught <= 0.3 * 0.5 ** (t - 1) * record["items"]
        assert taught + figures["among_students"] == record["items"]
        assert record["dropped"].get("teacher_share", 0) + record["dropped"].get("teacher_unlikely", 0) > 0
        assert record["items"] > sum(record["replayed"].values()) > 0 if t > 1 else not record["replayed"]


@pytest.mark.parametrize("moment", ["after 3 label", "after 3 annotate", "before 3 train"])
def test_killed_and_resumed_the_guards_leave_the_same_pairs(guarded, toy_config, warm_cli, tmp_path, moment):
    config = toy_config(tmp_path, GUARDED, answer=ANSWER)
    assert warm_cli("run", config, log=tmp_path / "log", kill=[moment, 1]).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    for t in range(1, 4):
        ours, theirs = (records(folder, t)["train"] for folder in (tmp_path, guarded))
        for key in ("items", "dropped", "replayed", "figures", "loss_first", "loss_last"):
            assert ours[key] == theirs[key], key
    ours, theirs = (np.load(folder / "runs/toy/exports/0003/logits.npy") for folder in (tmp_path, guarded))
    assert np.array_equal(ours, theirs)


def test_the_best_iterate_is_kept(whole):
    gained = [0.0, *(records(whole, t)["measure"]["gains"]["reward"]["low"] for t in range(1, ITERATIONS + 1))]
    best = int(np.argmax(gained))
    assert records(whole, ITERATIONS)["commit"]["best"] == best
    kept = {int(path.name) for path in (whole / "runs/toy/exports").iterdir()}
    assert kept == {ITERATIONS - 1, ITERATIONS, best} - {0} | {ITERATIONS - 1}


def gained(low: float, high: float, of: str = "reward") -> dict:
    """As `measure` records it, with nothing known of the other figure."""
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    known = {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
    return {"gains": {"reward": nothing, "win_rate": nothing} | {of: known}}


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({0: {"reward": 0.5}, 1: {"reward": 0.9}, 2: {"reward": 0.9}, 3: {"reward": 0.1}}, 1),
        ({0: {"reward": 0.5}, 1: {"reward": 0.4}}, 0),
        ({0: {"reward": None}, 1: {"reward": None, "win_rate": {"value": 0.4}}, 2: {"win_rate": {"value": 0.7}}}, 2),
        ({0: {"reward": math.nan}, 1: {"reward": math.nan, "win_rate": {"value": 0.3}}}, 0),
        ({0: {"reward": None}, 1: {"reward": None, "win_rate": {"value": None}}, 2: {"win_rate": {"value": math.nan}}}, 2),
        ({0: {"reward": None}, 1: {"reward": None, "win_rate": {"value": 0.4}}, 2: {"win_rate": {"value": None}}}, 0),
        # What was surely gained, not what was gained on average; where nothing was, the base model.
        ({0: {}, 1: gained(0.2, 0.4), 2: gained(0.1, 0.9)}, 1),
        ({0: {}, 1: gained(-0.1, 0.4), 2: gained(-0.2, 0.9)}, 0),
        ({0: {}, 1: gained(0.2, 0.4), 2: gained(0.2, 0.9)}, 1),
        ({0: {}, 1: gained(0.2, 0.4, "win_rate"), 2: gained(0.3, 0.4, "win_rate")}, 2),
        # The oracle was changed: rewards of 2 have another meaning, win rates have not.
        ({0: {}, 1: gained(5.0, 6.0) | {}, 2: gained(0.1, 0.4, "win_rate")}, 2),
        ({0: {}, 1: gained(math.nan, math.nan), 2: gained(math.nan, math.nan)}, 2),
    ],
)
def test_which_iterate_is_the_best(measured, best):
    assert best_iterate(measured) == best


def test_without_stored_answers_there_is_no_teacher(toy_config, warm_cli, tmp_path):
    done = warm_cli("check", toy_config(tmp_path, {k: v for k, v in DNO.items() if k not in COUNTED}))
    assert done.returncode != 0
    assert "40 of 40 prompts have no reference answer, which the algorithm needs" in done.message


def test_without_replay_and_teacher_nothing_comes_back(toy_config, warm_cli, tmp_path):
    plain = {"algorithm.name": "dno_prct", "algorithm.replay": 0.0, "iterations": 2}
    dpo = {"pairing.name": "all_pairs", "reference.schedule": "previous", "iterations": 2}
    found = []
    for name, knobs in (("dno", plain), ("dpo", dpo)):
        done = warm_cli("run", toy_config(tmp_path, knobs, name=name, file=f"{name}.yaml"))
        assert done.returncode == 0, done.message
        found.append(everything(tmp_path / "runs" / name, 2)["weights"])
    assert found[0] == found[1], "without filters it is dpo against the iterate before"
