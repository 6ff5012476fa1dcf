"""OSP whose oracle is the policy itself, on the toy engine, with a learner whose exports are real language models."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preference_rows import taste, write_rows
from toy_runs import everything, unpaid

from onlinerl.oracles.self_judge import SelfJudge
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Query

KILLED = -signal.SIGKILL
ITERATIONS = 3
JUDGE = {
    "device": "cpu",
    "labels": ["good", "bad"],
    "template": "{prompt} {response_a} was {response_b} {form} {rubric}",
    "rubric": "story",
}
KEYS: dict[str, object] = {
    "algorithm.name": "osp",
    "oracle.name": "self_judge",
    **{f"oracle.{key}": value for key, value in JUDGE.items()},
    "oracle.groups_per_call": 4,
    "pairing.tie_within": 0.0,  # of a model of random weights any two answers are nearly tied
    "metrics.prometheus": False,
    "sampling.max_new_tokens": 5,
}


def snapshot(path: Path) -> SelfJudge:
    """The judge that these weights are."""
    return SelfJudge(**{**JUDGE, "labels": ("good", "bad"), "path": str(path)})


def moving(folder: Path) -> dict[str, object]:
    """With the iterate as the judge, and pairs that watch it."""
    return {
        **KEYS,
        "oracle.judge_version": "iteration_start",
        "learner.name": "exporting.Exporting",
        "checkpoints.exports": "all",
        "anchors.data": write_rows(folder / "anchors.jsonl", taste(12)),
        "anchors.apply_chat_template": False,
        "anchors.min_accuracy": 0.0,
    }


def rows(run: Path, iteration: int, table: str) -> list[dict[str, Any]]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, table)


def versions(run: Path, table: str, first: int = 1) -> list[set[str]]:
    return [{row["oracle_version"] for row in rows(run, t, table)} for t in range(first, ITERATIONS + 1)]


def of_run(run: Path) -> dict[str, Any]:
    tables = ("rollouts", "verdicts", "pairs", "anchor_verdicts", "comparisons_0000")
    kept = {
        f"{t} {name}": sorted(str(unpaid(row)) for row in rows(run, t, name))
        for t in range(1, ITERATIONS + 1)
        for name in tables
    }
    return everything(run, ITERATIONS) | kept


def test_the_model_that_the_run_begins_with_judges_all_of_it(toy_config, warm_cli, tmp_path, tiny_model):
    done = warm_cli("run", toy_config(tmp_path, KEYS), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    version = snapshot(tiny_model).version
    assert versions(run, "verdicts") == versions(run, "comparisons_0000") == [{version}] * ITERATIONS
    assert all(0 < row["prob"] < 1 for t in (1, 2, 3) for row in rows(run, t, "pairs")), "soft labels"


@pytest.fixture(scope="module")
def straight(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = warm_cli_in(folder)("run", toy_config(folder, moving(folder)), log=folder / "log", refresh=True)
    assert done.returncode == 0, done.message
    return folder


def test_each_iteration_is_judged_by_the_iterate_that_it_samples_from(straight, tiny_model):
    run = straight / "runs/toy"
    snapshots = [tiny_model, *(run / f"exports/{t:04d}" for t in range(1, ITERATIONS))]
    wanted = [{snapshot(path).version} for path in snapshots]
    assert len(set.union(*wanted)) == ITERATIONS
    assert versions(run, "verdicts") == versions(run, "comparisons_0000") == wanted
    assert versions(run, "anchor_verdicts", first=0) == [wanted[0], set(), *wanted[1:]], (
        "each version once, before it judges anything"
    )
    with RunDirectory.open(run) as opened:
        found = [opened.phases(t)["refresh"] for t in range(1, ITERATIONS + 1)]
    assert [one["weights"] for one in found] == ["exports/0001", "exports/0002", "exports/0003"]
    assert [{one["oracle_versions"][0]} for one in found] == wanted


def test_labels_reproduce_from_the_snapshot(straight):
    run = straight / "runs/toy"
    alone = snapshot(run / "exports/0002")
    with RunDirectory.open(run) as opened:
        prompts = {prompt.id: prompt for prompt in opened.prompts("train")}
        groups = {group.prompt.id: group for group in opened.groups(3, "rollouts", prompts)}
    for row in rows(run, 3, "verdicts"):
        group = groups[row["prompt_id"]]
        (said,) = alone.judge([Query(prompt=group.prompt, responses=tuple(r.text for r in group.rollouts))])
        np.testing.assert_allclose(np.array(row["log_odds"], float), np.array(said.log_odds), atol=1e-4)


MOMENTS = [
    ["before 1 refresh", 1],
    ["reload", 1],
    ["after 1 refresh", 1],
    ["before 2 label", 1],
    ["reload", 2],
    ["before 2 commit", 1],
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(f"{moment[0]} {moment[1]}".split()))
def test_killed_and_resumed_it_is_the_same_run(straight, toy_config, warm_cli, tmp_path, moment):
    config = toy_config(tmp_path, moving(tmp_path))
    stopped = warm_cli("run", config, log=tmp_path / "log", refresh=True, kill=moment)
    assert stopped.returncode == KILLED, stopped.message
    done = warm_cli("resume", tmp_path / "runs/toy", log=tmp_path / "again", refresh=True)
    assert done.returncode == 0, done.message
    assert "verdicts of another version" not in done.stdout, "the versions are the run's own"
    found, wanted = of_run(tmp_path / "runs/toy"), of_run(straight / "runs/toy")
    for name in wanted:
        assert found[name] == wanted[name], name


def test_with_lag_it_is_the_iterate_that_sampled(toy_config, warm_cli, tmp_path, tiny_model):
    done = warm_cli("run", toy_config(tmp_path, moving(tmp_path), **{"schedule.max_lag": 1}), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    first, third = (snapshot(path).version for path in (tiny_model, run / "exports/0001"))
    assert versions(run, "verdicts") == [{first}, {first}, {third}]


def test_an_export_that_was_damaged_stops_the_resume(straight, toy_config, warm_cli, tmp_path):
    stopped = warm_cli(
        "run", toy_config(tmp_path, moving(tmp_path)), log=tmp_path / "log", refresh=True, kill=["after 1 refresh", 1]
    )
    assert stopped.returncode == KILLED, stopped.message
    damaged = tmp_path / "runs/toy/exports/0001/model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = warm_cli("resume", tmp_path / "runs/toy")
    assert done.returncode not in (0, KILLED)
    assert "model.safetensors" in done.stderr
