"""Runs whose reward model is trained between iterations, on the toy engine and learner, with a tiny Llama as the reward model and the torch learner
in the run's own process."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import COUNTED, events, everything, unpaid
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from onlinerl.errors import Interrupted
from onlinerl.oracles.reward_model import RewardModel
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise
from onlinerl.trackers.jsonl import read_metrics

KILLED = -signal.SIGKILL
ITERATIONS = 4
TABLES = ("rollouts", "verdicts", "pairs", "evaluation", "evaluation_verdicts", "refresh_labels", "refreshed_verdicts")


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A random reward model that reads the words of the policy."""
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=128, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def keys(model):
    judge = {"name": "python", "function": "hooks.judge", "groups_per_call": 2}
    return {
        **{key: value for key, value in COUNTED.items() if not key.startswith("oracle.")},
        "iterations": ITERATIONS,
        "cluster.device": "cpu",
        "oracle.name": "refreshed",
        "oracle.base": {"name": "reward_model", "path": str(model), "device": "cpu", "batch_size": 1},
        "checkpoints.keep": 4,
        "oracle.labels": judge,
        "oracle.every": 2,
        "oracle.prompts": 12,
        "prompts.per_iteration": 16,
        "prompts.reuse": True,
        "sampling.max_new_tokens": 5,
        "oracle.min_new_labels": 20,
        "oracle.heldout_share": 0.3,
        "oracle.batch_size": 16,
        "oracle.epochs": 6,
        "oracle.learning_rate": 0.005,
        "oracle.max_concurrent": 1,
    }


@pytest.fixture(scope="module")
def straight(toy_config, keys, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = warm_cli_in(folder)("run", toy_config(folder, keys), log=folder / "log", refresh=True)
    assert done.returncode == 0, done.message
    return folder


def records(run: Path, phase: str = "refresh") -> list[dict[str, Any]]:
    with RunDirectory.open(run) as opened:
        return [opened.phases(t)[phase] for t in range(1, ITERATIONS + 1)]


def rows(run: Path, iteration: int, table: str) -> list[dict[str, Any]]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, table)


def versions(run: Path, table: str) -> list[set[str]]:
    """Of the oracle that gave the verdicts of each iteration."""
    return [{row["oracle_version"] for row in rows(run, t, table)} for t in range(1, ITERATIONS + 1)]


def of_run(run: Path) -> dict[str, Any]:
    """All that a run leaves behind, without times and where it lies."""
    timeless = [{k: v for k, v in one.items() if k not in ("seconds", "began", "ended", "waited")} for one in records(run)]
    tables = {
        f"{t} {name}": sorted(json.dumps(unpaid(row), sort_keys=True, default=str) for row in rows(run, t, name))
        for t in range(1, ITERATIONS + 1)
        for name in TABLES
    }
    weights = {str(path.relative_to(run)): path.read_bytes() for path in (run / "oracle/refresh").rglob("*.safetensors")}
    return everything(run, ITERATIONS) | {"records": timeless, "tables": tables, "reward_models": weights}


def figures(run: Path, name: str) -> Iterator[dict[str, Any]]:
    return (record for record in read_metrics(run / "metrics.jsonl") if record["name"] == name)


def test_it_is_refreshed_twice_and_each_iteration_is_judged_by_one_version(straight):
    run = straight / "runs/toy"
    found = records(run)
    assert [(one["trained"], one["taken"]) for one in found] == [(False, False), (True, True)] * 2
    assert [one["asked"] for one in found] == [12] * ITERATIONS
    labelled = versions(run, "verdicts")
    assert all(len(each) == 1 for each in labelled)
    assert labelled[0] == labelled[1] != labelled[2] == labelled[3]
    assert versions(run, "evaluation_verdicts") == labelled, "measured by the version that it was trained on"
    (before, after), (again, last) = (found[t]["oracle_versions"] for t in (1, 3))
    assert ({before}, {after}, {again}) == (labelled[1], labelled[2], labelled[3])
    assert len({before, after, last}) == 3
    said = {row["oracle_version"] for t in range(1, ITERATIONS + 1) for row in rows(run, t, "refresh_labels")}
    assert said.isdisjoint({before, after, last}), "the model never learns from itself"


def test_it_learns_and_the_figures_say_of_which_version_they_are(straight):
    run = straight / "runs/toy"
    second = records(run)[1]
    assert second["comparisons"]["trained"] > second["comparisons"]["heldout"] > 0
    assert second["after"]["value"] > second["before"]["value"]
    assert second["change"]["value"] == pytest.approx(second["after"]["value"] - second["before"]["value"])
    before, after = second["oracle_versions"]
    accuracy = {(r["iteration"], r["labels"]["kind"]): r for r in figures(run, "refresh_accuracy")}
    assert accuracy.keys() == {(t, which) for t in (2, 4) for which in ("before", "after")}
    assert (accuracy[2, "before"]["oracle_version"], accuracy[2, "after"]["oracle_version"]) == (before, after)
    assert accuracy[2, "after"]["value"] == second["after"]["value"]
    assert accuracy[2, "after"]["ci_low"] <= accuracy[2, "after"]["value"] <= accuracy[2, "after"]["ci_high"]
    assert [(r["iteration"], r["value"]) for r in figures(run, "refresh_taken")] == [(2, 1.0), (4, 1.0)]
    assert [r["oracle_version"] for r in figures(run, "refresh_reward_shift")] == [after, records(run)[3]["oracle_versions"][1]]


def test_the_jump_between_versions_is_that_of_the_same_answers(straight):
    run = straight / "runs/toy"
    then, now = (
        {row["prompt_id"]: row["scores"][0] for row in rows(run, 2, t)} for t in ("evaluation_verdicts", "refreshed_verdicts")
    )
    assert then.keys() == now.keys()
    shift = records(run)[1]["reward_shift"]
    assert shift["value"] == pytest.approx(sum(now[key] - then[key] for key in now) / len(now))
    assert shift["low"] <= shift["value"] <= shift["high"]
    (shown,) = (r for r in figures(run, "refresh_reward_shift") if r["iteration"] == 2)
    assert shown["value"] == shift["value"]


def test_what_judges_is_what_was_trained(straight):
    """By the scores of an oracle of its own that reads the directory which the record names."""
    run = straight / "runs/toy"
    training, _, step = records(run)[1]["weights"].partition("/")
    folder = run / f"oracle/refresh/{training}/exports/{int(step):04d}"
    alone = RewardModel(path=str(folder), device="cpu")
    with RunDirectory.open(run) as opened:
        prompts = {prompt.id: prompt for prompt in opened.prompts("train")}
        groups = {group.prompt.id: group for group in opened.groups(3, "rollouts", prompts)}
    from onlinerl.types import Query

    for row in rows(run, 3, "verdicts")[:3]:
        group = groups[row["prompt_id"]]
        (said,) = alone.judge([Query(prompt=group.prompt, responses=tuple(r.text for r in group.rollouts))])
        assert row["scores"] == pytest.approx(list(said.scores), abs=1e-5)


def test_win_rates_are_of_one_version(straight):
    """The base model's answers were judged by the first one: where that is gone both answers are judged again."""
    run = straight / "runs/toy"
    assert rows(run, 2, "comparisons_0000") == []
    assert {row["oracle_version"] for row in rows(run, 3, "comparisons_0000")} == {records(run)[1]["oracle_versions"][1]}
    assert summarise(run)["iterations"][3]["win_rate"]["n"] == 10


def test_what_is_not_needed_any_more_is_removed(straight):
    folder = straight / "runs/toy/oracle/refresh"
    assert sorted(path.name for path in folder.iterdir()) == ["0002", "0004"]
    assert not list(folder.glob("*/checkpoints/[0-9]*"))
    assert all(len(list((folder / name / "exports").glob("[0-9]*"))) == 1 for name in ("0002", "0004"))


MOMENTS = [
    ["judge", 4],
    ["before 1 refresh", 1],
    ["reward measured", 1],
    ["reward before.json", 1],
    ["reward step", 3],
    ["reward save", 1],
    ["reward saved", 1],
    ["reward export", 1],
    ["reward measured", 2],
    ["reward report.json", 1],
    ["reload", 1],
    ["before 2 refresh", 1],
    ["after 2 refresh", 1],
    ["before 3 label", 1],
    ["reward step", 15],
    ["after 4 refresh", 1],
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(f"{moment[0]} {moment[1]}".split()))
def test_killed_and_resumed_it_is_the_same_run(straight, toy_config, keys, warm_cli, tmp_path, moment):
    config, log = toy_config(tmp_path, keys), tmp_path / "log"
    stopped = warm_cli("run", config, log=log, refresh=True, kill=moment)
    assert stopped.returncode == KILLED, stopped.message
    done = warm_cli("resume", tmp_path / "runs/toy", log=tmp_path / "again", refresh=True)
    assert done.returncode == 0, done.message
    assert "verdicts of another version" not in done.stdout, "the versions are the run's own"
    found, wanted = of_run(tmp_path / "runs/toy"), of_run(straight / "runs/toy")
    for name in wanted:
        assert found[name] == wanted[name], name
    asked = [
        json.dumps(one)
        for where in (log, tmp_path / "again")
        for e in events(where)
        if e["kind"] == "judge"
        for one in e["asked"]
    ]
    labels = [one for one in asked if "It was good" not in one]
    lost = 2 if moment[0] == "judge" else 0  # those of the call that it was killed in
    assert len(labels) - len(set(labels)) <= lost
    steps = sum(e["kind"] == "reward step" for where in (log, tmp_path / "again") for e in events(where))
    once = sum(e["kind"] == "reward step" for e in events(straight / "log"))
    if moment[0] in ("reward step", "reward save"):
        assert once < steps < 2 * once
    else:
        assert steps == once, "what has a checkpoint is not trained again"


def test_stopped_by_a_signal_in_a_training_it_goes_on(straight, toy_config, keys, warm_cli, tmp_path):
    config = toy_config(tmp_path, keys)
    stopped = warm_cli("run", config, log=tmp_path / "log", refresh=True, stop=["reward step", 3])
    assert stopped.returncode == Interrupted.exit_code, stopped.message
    done = warm_cli("resume", tmp_path / "runs/toy", log=tmp_path / "again", refresh=True)
    assert done.returncode == 0, done.message
    found, wanted = of_run(tmp_path / "runs/toy"), of_run(straight / "runs/toy")
    for name in ("records", "tables", "weights", "reward_models"):
        assert found[name] == wanted[name], name


@pytest.mark.parametrize("schedule", [{"stream": True, "evaluate_beside": True}, {"evaluate_beside": True}])
def test_other_schedules_make_the_same_run(straight, toy_config, keys, warm_cli, tmp_path, schedule):
    config = toy_config(tmp_path, keys | {f"schedule.{key}": value for key, value in schedule.items()})
    done = warm_cli("run", config, log=tmp_path / "log", refresh=True)
    assert done.returncode == 0, done.message
    found, wanted = of_run(tmp_path / "runs/toy"), of_run(straight / "runs/toy")
    for name in ("weights", "records", "reward_models", "tables"):
        assert found[name] == wanted[name], name


def test_with_lag_each_iteration_is_judged_by_one_version(toy_config, keys, warm_cli, tmp_path):
    done = warm_cli("run", toy_config(tmp_path, keys | {"schedule.max_lag": 1, "schedule.stream": True}), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    labelled = versions(tmp_path / "runs/toy", "verdicts")
    assert all(len(each) == 1 for each in labelled)
    assert labelled[0] == labelled[1] != labelled[2] == labelled[3]


def test_weights_that_are_worse_are_not_taken(toy_config, keys, warm_cli, tmp_path):
    """From iteration 4 on it learns that the worse response is the better one: the fault that the held-out labels are there for."""
    config = toy_config(tmp_path, keys | {"oracle.mode": "continue", "oracle.replay": 1.0, "oracle.epochs": 8})
    done = warm_cli("run", config, log=tmp_path / "log", refresh=True, turned=4)
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    second, last = records(run)[1], records(run)[3]
    assert second["taken"]
    assert (last["trained"], last["taken"], last["weights"]) == (True, False, None)
    assert last["change"]["high"] < 0
    assert "are not taken" in last["reason"]
    assert "the reward model stays as it is" in " ".join(done.stdout.split())
    assert last["oracle_versions"] == [second["oracle_versions"][1]] * 2
    assert [r["value"] for r in figures(run, "refresh_taken")] == [1.0, 0.0]
    assert not list((run / "oracle/refresh/0004/exports").glob("[0-9]*"))
    more = warm_cli("resume", run, "iterations=5", log=tmp_path / "again")
    assert more.returncode == 0, more.message
    assert {row["oracle_version"] for row in rows(run, 5, "verdicts")} == {second["oracle_versions"][1]}


def test_known_pairs_are_asked_of_each_new_version(toy_config, keys, warm_cli, tmp_path):
    lines = [{"prompt": f"the film {i}", "chosen": " good", "rejected": " bad"} for i in range(20)]
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    anchors = {
        "anchors.data": str(tmp_path / "anchors.jsonl"),
        "anchors.apply_chat_template": False,
        "anchors.min_accuracy": 0.0,
    }
    done = warm_cli("run", toy_config(tmp_path, keys | anchors), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert [bool(one["asked"]) for one in records(tmp_path / "runs/toy", "examine")] == [False, False, True, False]


def test_too_few_labels_are_waited_for_and_counted_the_next_time(toy_config, keys, warm_cli, tmp_path):
    done = warm_cli("run", toy_config(tmp_path, keys | {"oracle.min_new_labels": 200}), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    found = records(tmp_path / "runs/toy")
    assert [one["trained"] for one in found] == [False, False, False, True]
    assert "oracle.min_new_labels is 200" in found[1]["reason"]


@pytest.mark.parametrize(
    ("more", "share"), [({"oracle.replay": 0.0}, 0.6), ({"oracle.replay": 1.0}, 1.0), ({"oracle.mode": "retrain"}, 1.0)]
)
def test_what_is_trained_on_again(straight, toy_config, keys, warm_cli, tmp_path, more, share):
    """Of the four iterations the last training knows: the new two, some of the older two, or all of them."""
    done = warm_cli("run", toy_config(tmp_path, keys | more), log=tmp_path / "log", refresh=True)
    assert done.returncode == 0, done.message
    last = records(tmp_path / "runs/toy")[3]
    with RunDirectory.open(tmp_path / "runs/toy") as opened:
        pairs = sum(6 for t in range(1, 5) for _ in opened.read(t, "refresh_labels"))
    total = sum(last["comparisons"].values())
    assert total <= pairs
    if share == 1.0:
        assert total > 0.8 * pairs, "but for equal responses"
    else:
        assert last["comparisons"]["trained"] < 0.5 * pairs
    model = json.loads((tmp_path / "runs/toy/oracle/refresh/0004/manifest.json").read_text())["model"]["model"]
    assert ("0002" in model) == (more.get("oracle.mode") != "retrain"), "what it begins with"


def test_a_run_that_gets_more_iterations_goes_on_with_the_newest_weights(straight, warm_cli, tmp_path):
    shutil.copytree(straight / "runs", tmp_path / "runs")
    done = warm_cli("resume", tmp_path / "runs/toy", "iterations=5", log=tmp_path / "again")
    assert done.returncode == 0, done.message
    assert {row["oracle_version"] for row in rows(tmp_path / "runs/toy", 5, "verdicts")} == {
        records(straight / "runs/toy")[3]["oracle_versions"][1]
    }


def test_weights_that_are_damaged_stop_the_run(straight, warm_cli, tmp_path):
    shutil.copytree(straight / "runs", tmp_path / "runs")
    (file,) = (tmp_path / "runs/toy/oracle/refresh/0004/exports").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    done = warm_cli("resume", tmp_path / "runs/toy", "iterations=5", log=tmp_path / "again")
    assert done.returncode != 0
    assert "does not agree with its checksum" in done.stderr


def test_iterations_that_were_removed_are_computed_again_with_the_weights_of_then(straight, warm_cli, tmp_path):
    """What a later training has left is neither taken for the weights in use nor gone on with unless it is the same."""
    shutil.copytree(straight / "runs", tmp_path / "runs")
    run = tmp_path / "runs/toy"
    for kind in ("iterations", "exports", "checkpoints"):
        for t in (3, 4):
            shutil.rmtree(run / kind / f"{t:04d}")
    done = warm_cli("resume", run, log=tmp_path / "again")
    assert done.returncode == 0, done.message
    found, wanted = of_run(run), of_run(straight / "runs/toy")
    assert found["tables"] == wanted["tables"]
    assert found["reward_models"] == wanted["reward_models"]


def test_labels_and_their_cost_are_shown(straight, warm_cli):
    done = warm_cli("labels", straight / "runs/toy", "--json")
    assert done.returncode == 0, done.message
    costs = [row for row in json.loads(done.stdout)["costs"] if row["phase"] == "refresh"]
    assert {row["iteration"] for row in costs} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["judge_score", "judge_pair"])
def test_the_requests_that_check_foretells_are_those_that_a_judge_gets(toy_config, keys, warm_cli, tmp_path, name):
    """Also one that only compares."""
    pytest.importorskip("aiohttp")
    from judges import judging

    with judging() as server:
        judge = {"name": name, "base_url": f"{server.url}/v1", "model": "judge", "price_per_request": 0.01}
        config = toy_config(tmp_path, keys | {"oracle.labels": judge, "iterations": 2})
        said = warm_cli("check", config)
        assert said.returncode == 0, said.message
        foretold = re.search(
            r"oracle.labels: (\d+) requests for 4 responses to a prompt, at most (\d+) an iteration and (\d+) for the whole run; about \$(\S+)",
            said.stdout,
        )
        assert foretold is not None, said.stdout
        done = warm_cli("run", config, log=tmp_path / "log")
        assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    cost = [row["cost"] for t in (1, 2) for row in rows(run, t, "refresh_labels")]
    assert sum(each["calls"] for each in cost) == int(foretold[3])
    assert sum(each["usd"] for each in cost) == pytest.approx(float(foretold[4]), abs=0.01)
    with RunDirectory.open(run) as opened:
        assert opened.phases(2)["refresh"]["trained"]
