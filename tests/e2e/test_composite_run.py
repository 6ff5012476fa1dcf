"""Runs whose oracle asks others, on the toy engine and learner: what is checked, kept and read of them."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from toy_runs import COUNTED, PROBE, events, everything

from onlinerl import config as configuration
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise
from onlinerl.trackers.jsonl import read_metrics

KILLED = -signal.SIGKILL
MEMBERS = {
    "tone": {"name": "sentiment"},
    "counted": {"name": "python", "function": "hooks.judge", "groups_per_call": 2},
    "short": {"name": "format", "pattern": ".*", "max_length": 40},
}
TOGETHER = {
    **{key: value for key, value in COUNTED.items() if not key.startswith("oracle.")},
    "oracle.name": "composite",
    "oracle.members": MEMBERS,
    "oracle.weights": {"counted": 0.5, "short": 0.0},
    "oracle.groups_per_call": 4,
    "oracle.max_concurrent": 1,
}
CONSTRAINED = {
    **TOGETHER,
    "algorithm.name": "constrained",
    "algorithm.objective": "score",
    "algorithm.thresholds": {"tone": 0.2, "short": 0.5},
}


@pytest.fixture(scope="module")
def straight(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("together")
    done = warm_cli_in(folder)("run", toy_config(folder, CONSTRAINED), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


def test_every_score_is_kept_and_read_by_its_name(straight):
    with RunDirectory.open(straight / "runs/toy") as run:
        rows, record = run.read(1, "verdicts"), run.phases(1)["train"]
    named = [{each["name"]: each["scores"] for each in row["components"]} for row in rows]
    assert all(set(each) == {"tone", "counted", "short"} for each in named)
    for row, each in zip(rows, named, strict=True):
        assert row["scores"] == pytest.approx([a + 0.5 * b for a, b in zip(each["tone"], each["counted"], strict=True)])
    values = [value for each in named for value in each["tone"]]
    assert record["figures"]["mean_tone"] == pytest.approx(sum(values) / len(values))


def test_a_member_without_weight_is_measured_on_the_heldout_prompts_all_the_same(straight):
    """By what is stored: its mean score, and how often it prefers the answer of the iterate to that of the base model."""
    rows = summarise(straight / "runs/toy")["iterations"]
    with RunDirectory.open(straight / "runs/toy") as run:
        for row in rows:
            t = row["iteration"]
            now, base = ({v["prompt_id"]: v["components"] for v in run.read(i, "evaluation_verdicts")} for i in (t, 0))
            assert set(row["components"]) == {"tone", "counted", "short"}
            for name, said in row["components"].items():
                own, then = (
                    {key: next(c["scores"][0] for c in each if c["name"] == name) for key, each in found.items()}
                    for found in (now, base)
                )
                assert said["score"]["value"] == pytest.approx(sum(own.values()) / len(own))
                assert said["score"]["low"] <= said["score"]["value"] <= said["score"]["high"]
                wins = [0.5 if own[key] == then[key] else float(own[key] > then[key]) for key in own]
                assert (said["win_rate"] is None) == (t == 0)
                if t:
                    assert said["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins))
                    assert said["win_rate"]["n"] == len(wins)
    assert rows[-1]["reward"] == pytest.approx(
        rows[-1]["components"]["tone"]["score"]["value"] + 0.5 * rows[-1]["components"]["counted"]["score"]["value"]
    )
    records = [r for r in read_metrics(straight / "runs/toy/metrics.jsonl") if r["name"].startswith("component_")]
    assert {(r["name"], r["iteration"], r["labels"]["component"]) for r in records} == {
        (f"component_{what}", t, name)
        for t in range(len(rows))
        for name in MEMBERS
        for what in ("score", "win_rate")
        if what == "score" or t
    }


def test_a_resume_goes_on_as_if_nothing_had_happened(straight, toy_config, warm_cli, tmp_path):
    config = toy_config(tmp_path, CONSTRAINED)
    stopped = warm_cli("run", config, log=tmp_path / "log", kill=["judge", 5])
    assert stopped.returncode == KILLED, stopped.message
    done = warm_cli("resume", "runs/toy", "oracle.members.counted.groups_per_call=1", log=tmp_path / "log2")
    assert done.returncode == 0, done.message
    assert everything(tmp_path / "runs/toy") == everything(straight / "runs/toy")


def test_what_is_computed_cannot_change_inside_either(straight, warm_cli):
    done = warm_cli("resume", straight / "runs/toy", "oracle.members.short.max_length=41", "iterations=4")
    assert done.returncode == 2
    assert "oracle.members.short.max_length" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"oracle.members": {"tone": {"name": "python", "function": "nowhere.judge"}}, "oracle.weights": {}},
            "oracle.members.tone.function",
        ),
        ({"algorithm.thresholds": {"kindness": 0.1}}, "oracle.name=composite with members.kindness"),
        ({"oracle.members": {"tone": {"name": "reward_model", "path": "."}}, "oracle.weights": {}}, "oracle.members.tone.path"),
    ],
)
def test_check_says_what_is_wrong_inside(toy_config, warm_cli, tmp_path, overrides, said):
    done = warm_cli("check", toy_config(tmp_path, {**CONSTRAINED, **overrides}), log=tmp_path / "log")
    assert done.returncode == 2, done.message
    assert said in done.stderr


def test_an_ensemble_teaches_what_asks_how_sure_it_is(toy_config, warm_cli, tmp_path):
    """`upo` weighs pairs by it; a composite, whose members judge different things, is refused."""
    overrides = {**TOGETHER, "algorithm.name": "upo"}
    refused = warm_cli("check", toy_config(tmp_path, overrides), log=tmp_path / "log")
    assert refused.returncode == 2
    assert "oracle.name=ensemble" in refused.stderr
    overrides |= {"oracle.name": "ensemble", "oracle.weights": None}
    done = warm_cli("run", toy_config(tmp_path, overrides), "iterations=1", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        rows = run.read(1, "verdicts")
    assert all(row["uncertainty"][0][1] is not None for row in rows)
    assert "oracle_uncertainty" in (tmp_path / "runs/toy/metrics.jsonl").read_text()


def test_a_budget_holds_over_a_kill(toy_config, warm_cli, tmp_path):
    """Whatever is asked twice because of it is counted twice."""
    routed = {
        **{key: value for key, value in COUNTED.items() if not key.startswith("oracle.")},
        "oracle.name": "router",
        "oracle.cheap": {"name": "sentiment"},
        "oracle.expensive": {"name": "python", "function": "hooks.judge"},
        "oracle.expensive_below": 1.0,
        "oracle.budget_groups": 12,
        "oracle.groups_per_call": 2,
    }
    config = toy_config(tmp_path, routed)
    assert warm_cli("run", config, log=tmp_path / "log", kill=["judge", 9]).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log2")
    assert done.returncode == 0, done.message
    asked = [one for log in ("log", "log2") for one in events(tmp_path / log) if one["kind"] == "judge"]
    groups = [responses for one in asked for _, *responses in one["asked"]]
    assert 6 < len([responses for responses in groups if responses != PROBE]) <= 12
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        by = [row["annotator"].split(":")[1] for t in (1, 2, 3) for row in run.read(t, "verdicts")]
    assert {"cheap", "expensive"} == set(by)


DIRECTED = {**TOGETHER, "oracle.combine": "direction", "oracle.weights": None, "prompts.max_tokens": 32, "iterations": 2}


def test_each_prompt_is_told_its_direction_and_judged_in_it_whatever_happens(toy_config, warm_cli_in, tmp_path):
    """And read by people: `data` shows it, `check` and `run` say that the model expects one."""
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    run, killed = (warm_cli_in(tmp_path / name) for name in ("straight", "killed"))
    done = run("run", toy_config(tmp_path / "straight", DIRECTED), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert "an exported model expects one too, e.g. 'You are a helpful assistant." in done.stdout
    told = configuration.oracle(configuration.load(tmp_path / "straight/toy.yaml", [])).directions
    with RunDirectory.open(tmp_path / "straight/runs/toy") as opened:
        prompts = {prompt.id: prompt for prompt in (*opened.prompts("train"), *opened.prompts("heldout"))}
        for table, asked in (("verdicts", "rollouts"), ("evaluation_verdicts", "evaluation")):
            assert all(tuple(row["prompt_token_ids"]) == prompts[row["prompt_id"]].token_ids for row in opened.read(1, asked))
            for row in opened.read(1, table):
                weights = told.of(row["prompt_id"])
                scores = {each["name"]: each["scores"] for each in row["components"]}
                assert row["scores"] == pytest.approx(sum(weights[name] * np.asarray(scores[name]) for name in weights))
                assert row["raw"].startswith(f"direction: {told.words(row['prompt_id'])}")
    config = toy_config(tmp_path / "killed", DIRECTED)
    assert killed("run", config, log=tmp_path / "log", kill=["judge", 5]).returncode == KILLED
    done = killed("resume", "runs/toy", log=tmp_path / "log2")
    assert done.returncode == 0, done.message
    assert everything(tmp_path / "killed/runs/toy", 2) == everything(tmp_path / "straight/runs/toy", 2)
    shown = run("data", tmp_path / "straight/toy.yaml")
    assert "composite puts a direction of its own before each of these prompts (system turn)" in shown.stdout
    first, *_ = (line for line in shown.stdout.splitlines() if line.startswith("  p"))
    assert len(prompts[first.split()[0]].token_ids) == shown.stdout.split(first)[1].splitlines()[1].count("│") + 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {
                "oracle": {
                    "name": "composite",
                    "members": {"all": {"name": "composite", "members": MEMBERS, "combine": "direction"}},
                }
            },
            "oracle.members.all.combine: judges each prompt in a direction of its own",
        ),
        ({"algorithm.name": "reward_augmented"}, "reward_augmented puts the score that is wanted into prompts"),
    ],
)
def test_a_direction_that_no_prompt_could_say_is_refused(toy_config, warm_cli, tmp_path, overrides, said):
    base = {key: value for key, value in DIRECTED.items() if "oracle" not in overrides or not key.startswith("oracle")}
    done = warm_cli("check", toy_config(tmp_path, {**base, **overrides}), log=tmp_path / "log")
    assert done.returncode == 2, done.message
    assert said in done.stderr
