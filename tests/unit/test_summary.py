"""The summary says what the manifests say, in exactly the agreed shape."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from values import label, pair

from onlinerl.errors import StoreError
from onlinerl.protocols.store import EVALUATION, ROLLOUTS
from onlinerl.stores import oracle_versions, sweeps
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import samples, summarise
from onlinerl.types import Group, Label, Prompt, Rollout, Sampling, Verdict

UNSAID = {"kl_estimator": None, "kl_conflict": None, "insufficient": [], "idle": None, "oracle_versions": []}
RATE = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 100}


@pytest.fixture
def run(tmp_path):
    manifest = {"name": "demo", "config_digest": "x", "fingerprint": {"algorithm.name": "dpo"}}
    with RunDirectory.create(tmp_path / "demo", config_yaml="", manifest=manifest) as run:
        yield run


def test_a_committed_iteration(run):
    run.finish_phase(0, "measure", {"seconds": 2.0, "reward": 0.1, "kl_ref": 1e-9, "win_rate": RATE, "length": 20.0})
    run.finish_phase(0, "commit", {"status": "promoted"})
    run.finish_phase(1, "sample", {"seconds": 1.0, "samples": 256, "tokens": 9})
    run.finish_phase(1, "label", {"seconds": 0.5, "oracle_calls": 64, "failures": 1, "oracle_versions": {"v1": 63}})
    run.finish_phase(1, "annotate", {})
    run.finish_phase(1, "train", {"seconds": 3.0, "steps": 8, "tokens": 99})
    run.finish_phase(1, "checkpoint", {"seconds": 0.1})
    run.finish_phase(1, "sync", {"seconds": 0.2, "bytes": 1000, "proved": True, "replicas": 2})
    evaluated = {
        "seconds": 2.5,
        "reward": 0.4,
        "kl_ref": 1.5,
        "kl_prev": math.nan,
        "win_rate": RATE,
        "length": 21.5,
        "oracle_calls": 10,
        "kl_estimator": "k1",
        "kl_conflict": True,
        "insufficient": ["kl_ref", "reward"],
        "oracle_versions": {"v2": 10, "v1": 1},
    }
    run.finish_phase(1, "measure", evaluated)
    run.finish_phase(1, "commit", {"status": "promoted"})
    summary = summarise(run.path)
    assert summary == {
        "run": "demo",
        "algorithm": "dpo",
        "iterations": [
            {
                "iteration": 0,
                "reward": 0.1,
                "kl_ref": 0.0,
                "kl_prev": 0.0,
                "win_rate": None,
                "phases": {"measure": 2.0},
                "sync": None,
                "samples": None,
                "oracle_calls": None,
                "status": "promoted",
                **UNSAID,
            },
            {
                "iteration": 1,
                "reward": 0.4,
                "kl_ref": 1.5,
                "kl_prev": None,
                "win_rate": RATE,
                "phases": {"sample": 1.0, "label": 0.5, "train": 3.0, "checkpoint": 0.1, "sync": 0.2, "measure": 2.5},
                "sync": {"seconds": 0.2, "bytes": 1000, "proved": True},
                "samples": 256,
                "oracle_calls": 74,
                "status": "promoted",
                "kl_estimator": "k1",
                "kl_conflict": True,
                "insufficient": ["kl_ref", "reward"],
                "idle": None,
                "oracle_versions": ["v1", "v2"],
            },
        ],
    }
    json.dumps(summary, allow_nan=False)
    extra = summarise(run.path, extras=True)["iterations"]
    assert [row["length"] for row in extra] == [20.0, 21.5]
    assert extra[1]["oracle_failures"] == 1


def test_an_iteration_is_running_only_while_somebody_works_on_it(run):
    run.labels(1, "verdicts").append([label(1, 1.0)])
    run.finish_phase(10, "sample", {"seconds": 1.0, "samples": 4})
    statuses = {row["iteration"]: row["status"] for row in summarise(run.path)["iterations"]}
    assert statuses == {1: "running", 10: "running"}
    run.close()  # as if killed: the manifest still says "running"
    assert summarise(run.path)["iterations"][0] == {
        "iteration": 1,
        "reward": None,
        "kl_ref": None,
        "kl_prev": None,
        "win_rate": None,
        "phases": {},
        "sync": None,
        "samples": None,
        "oracle_calls": None,
        "status": "unfinished",
        **UNSAID,
    }


def test_a_response_that_nobody_judged_is_shown_without_a_win_rate(run):
    nan = math.nan
    rollouts = tuple(
        Rollout(
            token_ids=(k,), logprobs=(-1.0,), text=str(k), finish_reason="stop", policy_version=0, sampler=Sampling(), seed=k
        )
        for k in range(3)
    )
    group = Group(prompt=Prompt(id="p", text="x", token_ids=(1,)), rollouts=rollouts)
    verdict = Verdict(annotator="j", oracle_version="1", preferences=((nan, nan, 0.9), (nan,) * 3, (nan, nan, nan)))
    run.groups(1, "rollouts").append([group])
    run.labels(1, "verdicts").append([Label(prompt_id="p", result=verdict)])
    (shown,) = samples(run.path, 1, 1)
    assert [r["win_rate"] for r in shown["responses"]] == [pytest.approx(0.7), None, pytest.approx(0.3)]
    assert [r["score"] for r in shown["responses"]] == [None] * 3


def test_an_iteration_that_gave_nothing_to_learn(run):
    run.finish_phase(1, "train", {"seconds": 0.0, "steps": 0, "idle": "all 4 groups are ties"})
    run.finish_phase(1, "commit", {"status": "keep"})
    (row,) = summarise(run.path)["iterations"]
    assert (row["status"], row["idle"]) == ("keep", "all 4 groups are ties")


def test_a_group_that_was_asked_for_again_is_shown_once(run):
    first, again = (
        Group(prompt=Prompt(id="p", text="a", token_ids=(1,)), rollouts=(), rejected=reasons) for reasons in (("logprob",), ())
    )
    run.groups(1, ROLLOUTS).append([first, again])
    assert [shown["prompt_id"] for shown in samples(run.path, 1, 5)] == ["p"]


def test_verdicts_of_another_version_of_the_oracle_are_counted_in_tables_and_in_records(run):
    assert oracle_versions.caveat(run.path, "2") is None
    run.labels(1, "verdicts").append([label(0), *(judged(f"p{i}", "1") for i in range(2, 5))])
    run.finish_phase(1, "label", {"seconds": 0.5})  # by an older onlinerl, which did not record it
    run.labels(1, "comparisons_0000").append([judged("h0", "1"), judged("h1", "2")])
    run.finish_phase(2, "label", {"seconds": 0.5, "oracle_versions": {"0": 7, "2": 9}})
    assert oracle_versions.caveat(run.path, "1") is not None
    said = oracle_versions.caveat(run.path, "2")
    assert said is not None
    assert "verdicts of another version: 4 by 1, 7 by 0. They are kept. " in said
    run.labels(3, "verdicts").append([judged("p9", "0")])
    said = oracle_versions.caveat(run.path, "2")
    assert said is not None
    assert "8 by 0. They are kept; iteration 3 may be trained on verdicts of both. " in said


def judged(prompt_id: str, version: str) -> Label:
    return Label(prompt_id=prompt_id, result=Verdict(annotator="j", oracle_version=version, scores=(0.0, 1.0)))


def test_a_run_without_iterations_and_no_run(run, tmp_path):
    assert summarise(run.path)["iterations"] == []
    with pytest.raises(StoreError, match="holds no run"):
        summarise(tmp_path / "nothing")
    with pytest.raises(StoreError, match=f"there is no directory {tmp_path}/none"):
        summarise(tmp_path / "none/demo")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(StoreError, match="file holds no run"):
        summarise(tmp_path / "file")
    assert sweeps.read(tmp_path / "file") is None


def test_samples_before_there_are_any(run):
    """Nothing is promised that is not there yet."""
    with pytest.raises(StoreError, match="has sampled nothing to train on yet") as nothing:
        samples(run.path, 0, 5)
    assert "--heldout" not in nothing.value.fix
    with pytest.raises(StoreError, match="has no held-out answers yet"):
        samples(run.path, 0, 5, heldout=True)
    run.groups(0, EVALUATION).append([Group(prompt=Prompt(id="p", text="a", token_ids=(1,)), rollouts=())])
    with pytest.raises(StoreError) as answered:
        samples(run.path, 0, 5)
    assert "--heldout shows the base model's answers" in answered.value.fix


@pytest.mark.parametrize("sealed", [False, True])
def test_samples_for_people(run, sealed):
    groups = [
        Group(
            prompt=Prompt(id=f"p{i}", text=f"prompt {i}", token_ids=(i,)),
            rollouts=tuple(
                Rollout(
                    token_ids=(1,) * (k + 1),
                    logprobs=(-1.0,) * (k + 1),
                    text=f"answer {k}",
                    finish_reason="stop",
                    policy_version=0,
                    sampler=Sampling(),
                    seed=k,
                )
                for k in range(2)
            ),
        )
        for i in range(3)
    ]
    verdict = Verdict(annotator="judge", oracle_version="1", scores=(0.0, 100.0), raw="the second")
    tables = run.groups(1, "rollouts"), run.labels(1, "verdicts"), run.pairs(1)
    tables[0].append(groups)
    tables[1].append([label(1), Label(prompt_id="p0", result=verdict)])
    tables[2].append([pair(0)])
    if sealed:
        for table in tables:
            table.seal()
    shown = samples(run.path, 1, 3)
    json.dumps(shown, allow_nan=False)
    assert shown[0]["prompt"] == "prompt 0"
    assert shown[0]["responses"][1] == {
        "text": "answer 1",
        "source": "policy",
        "score": 100.0,
        "win_rate": 0.75,
        "tokens": 2,
        "finish_reason": "stop",
        "policy_version": 0,
    }
    assert shown[0]["pairs"] == [{"chosen": 1, "rejected": 0, "prob": 1.0, "gap": 0.5}]
    assert (shown[0]["oracle"], shown[0]["raw"], shown[0]["failure"]) == ("judge", "the second", None)
    assert (shown[1]["failure"], shown[1]["responses"][0]["score"]) == ("timeout: 60 s", None)
    assert (shown[2]["failure"], shown[2]["oracle"], shown[2]["pairs"]) == (None, None, [])
    assert len(samples(run.path, 1, 1)) == 1
    own = replace(groups[0].rollouts[0], text="the base model")
    run.groups(0, "evaluation").append([replace(groups[0], rollouts=(own,))])
    [own] = samples(run.path, 0, 3, heldout=True)
    assert "the base model" in str(own)
    with pytest.raises(StoreError, match="no samples of iteration 7") as caught:
        samples(run.path, 7, 1)
    assert "choose one of 1" in caught.value.fix
