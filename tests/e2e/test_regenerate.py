"""Responses that are trained on once more, on the toy engine and learner: what is sampled and asked, what is kept, and over kills the same."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from toy_runs import BATCH, COUNTED, HELDOUT, PROBE, events, everything, unpaid, weights

from onlinerl.stores import judged, summary
from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics

KILLED = -signal.SIGKILL
ITERATIONS, PROMPTS, K = 5, 8, 4
HALF = PROMPTS // 2
REGENERATED = COUNTED | {
    "algorithm.name": "optune",
    "selection.name": "regenerate",
    "prompts.reuse": True,
    "iterations": ITERATIONS,
}
BESIDE = {"schedule.stream": True, "schedule.evaluate_beside": True}
TABLES = ("selection", "rollouts", "verdicts", "logprobs", "pairs", "evaluation", "evaluation_verdicts")


@pytest.fixture(scope="module")
def command_in(toy_config, warm_cli_in):
    """Runs or resumes in a folder, on as many training prompts as an iteration takes unless it is told otherwise."""

    def command(where: Path, name: str, *overrides: str, knobs: dict | None = None, prompts: int = PROMPTS, **spec: object):
        config = toy_config(where, REGENERATED | (knobs or {}))
        train = where / "train.jsonl"
        train.write_text("\n".join(train.read_text().splitlines()[:prompts]) + "\n")
        started = config if name in ("run", "check") else where / "runs/toy"
        return warm_cli_in(where)(name, started, *overrides, log=where / "log", **spec)

    return command


def rows(run: Path, table: str) -> list[list[dict]]:
    """Of each iteration, by prompt."""
    with RunDirectory.open(run) as opened:
        return [sorted(opened.read(t, table), key=lambda row: row["prompt_id"]) for t in range(1, ITERATIONS + 1)]


def all_of(run: Path) -> dict:
    """All that a run keeps and reports, but for times and costs; rows in an order of their own, but for the choice of prompts."""
    with RunDirectory.open(run) as opened:
        kept = {
            (t, table): [json.dumps(unpaid(row)) for row in opened.read(t, table)]
            for t in range(1, ITERATIONS + 1)
            for table in TABLES
        }
    found = everything(run, ITERATIONS) | {
        "tables": {key: lines if key[1] == "selection" else sorted(lines) for key, lines in kept.items()}
    }
    for row in found["figures"]["iterations"]:
        row["phases"] = sorted(row["phases"])
    return found


@pytest.fixture(scope="module")
def straight(command_in, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = command_in(folder, "run")
    assert done.returncode == 0, done.message
    return folder


@pytest.fixture(scope="module")
def uninterrupted(straight):
    return all_of(straight / "runs/toy")


def test_a_half_is_sampled_and_the_rest_is_the_very_same_responses(straight):
    """With the version, the seeds and the verdict that they had; of the last time that they were sampled."""
    run = straight / "runs/toy"
    selection, groups, labels = (rows(run, table) for table in ("selection", "rollouts", "verdicts"))
    sampled: dict[str, tuple[int, dict, dict]] = {}
    for t, (chosen, group_rows, label_rows) in enumerate(zip(selection, groups, labels, strict=True), start=1):
        assert len(chosen) == len(group_rows) == len(label_rows) == PROMPTS
        reused = [one for one in chosen if one["reused_from"] is not None]
        assert len(reused) == (0 if t == 1 else PROMPTS - HALF)
        for one, group, label in zip(chosen, group_rows, label_rows, strict=True):
            if one["reused_from"] is None:
                assert set(group["policy_versions"]) == {t - 1}
                assert (label["reused_from"], label["cost"]["calls"]) == (None, 1) or label["reused_from"].endswith("verdicts")
                sampled[one["prompt_id"]] = (t, group, label)
                continue
            then, first_group, first_label = sampled[one["prompt_id"]]
            assert one["reused_from"] == then
            assert t - then <= 2, "max_age"
            assert group == first_group
            assert unpaid(label) == unpaid(first_label)
            assert label["cost"]["calls"] == 0
            assert label["reused_from"].endswith(f"iterations/{then:04d}/verdicts")


def test_who_was_answered_worst_against_the_base_is_sampled(straight):
    run = straight / "runs/toy"
    selection, labels = rows(run, "selection"), rows(run, "verdicts")
    scores = [{row["prompt_id"]: row["scores"] for row in table} for table in labels]
    for t in range(2, ITERATIONS + 1):
        chosen = {row["prompt_id"]: row for row in selection[t - 1]}
        rank = {}
        for prompt_id, first in scores[0].items():
            mean, latest = sum(first) / K, scores[t - 2][prompt_id]
            std = (sum((x - mean) ** 2 for x in first) / K) ** 0.5
            rank[prompt_id] = (sum(latest) / K - mean) / (std or 1.0)
        by_rank = {i for i, row in chosen.items() if "among the lowest" in row["reason"]}
        kept = {i for i, row in chosen.items() if row["reused_from"] is not None}
        stds = [len(set(first)) > 1 for first in scores[0].values()]
        if all(stds) and by_rank and kept:
            assert max(rank[i] for i in by_rank) <= min(rank[i] for i in kept) + 1e-9


def test_nothing_is_sampled_or_paid_for_that_is_there(straight):
    """Neither prompts nor questions."""
    log = events(straight / "log")
    generated = Counter(e["prompt"] for e in log if e["kind"] == "generate")
    assert generated.total() == PROMPTS + (ITERATIONS - 1) * HALF + (ITERATIONS + 1) * HELDOUT
    questions = Counter(json.dumps(asked) for e in log if e["kind"] == "judge" for asked in e["asked"] if asked[1:] != PROBE)
    assert set(questions.values()) == {1}


def test_ages_and_tokens_are_recorded_reported_and_shown(straight, command_in):
    run = straight / "runs/toy"
    selection, groups = rows(run, "selection"), rows(run, "rollouts")
    saved = 0
    for t in range(1, ITERATIONS + 1):
        tokens = {row["prompt_id"]: sum(map(len, row["token_ids"])) for row in groups[t - 1]}
        reused = {row["prompt_id"]: t - row["reused_from"] for row in selection[t - 1] if row["reused_from"]}
        with RunDirectory.open(run) as opened:
            sample, select, train = (opened.phases(t)[name] for name in ("sample", "select", "train"))
        ages = {str(age): count for age, count in sorted(Counter(reused.values()).items())}
        assert sample["reused"] == ages
        assert select["reused"] == len(reused)
        assert sample["tokens_saved"] == sum(tokens[i] for i in reused)
        assert sample["tokens"] == sum(tokens.values()) - sample["tokens_saved"]
        assert sample["samples"] == K * (PROMPTS - len(reused))
        assert train["sampled_by"] == sorted({t - 1, *(t - 1 - age for age in reused.values())})
        found = [r for r in read_metrics(run / "metrics.jsonl") if r["iteration"] == t]
        assert {r["labels"]["age"]: r["value"] for r in found if r["name"] == "prompts_reused"} == ages
        assert [r["value"] for r in found if r["name"] == "tokens_saved"] == [sample["tokens_saved"]]
        assert [r["value"] for r in found if r["name"] == "prompts_sampled"] == [PROMPTS - len(reused)]
        oldest = [r["value"] for r in found if r["name"] == "staleness" and r["labels"]["stat"] == "max"]
        assert oldest == [max(reused.values(), default=0)]
        saved += sample["tokens_saved"]
    shown = command_in(straight, "show")
    many = (ITERATIONS - 1) * (PROMPTS - HALF)
    assert re.search(
        rf"responses to {many} prompts were reused \(\d+ from 1 iteration before, \d+ from 2 iterations before\), {saved:,} tokens",
        " ".join(shown.stdout.split()),
    ), shown.message
    said = summary.summarise(run)["iterations"]
    assert "reused" not in said[0]
    assert sum(row["reused"]["tokens"] for row in said[1:]) == saved
    page = command_in(straight, "show", "--samples", "--iteration", "2", "--limit", "8")
    assert "selected: responses of iteration 1 once more: base rank 0" in page.stdout, page.message
    assert len(list(judged.judged(run))) == PROMPTS + (ITERATIONS - 1) * HALF, "who trains a reward model gets each once"


def test_killed_in_every_phase_it_is_the_same_run(command_in, uninterrupted, tmp_path):
    """In its middle, and when its work is done but not recorded; nothing is sampled or asked for twice but what was in the works."""
    kills = [
        ["before 2 select", 1],
        ["generate", 2],
        ["before 2 sample", 1],
        ["judge", 1],
        ["before 2 label", 1],
        ["logprobs", 1],
        ["before 2 annotate", 1],
        ["step", 1],
        ["save", 1],
        ["before 2 sync", 1],
        ["before 3 sample", 1],
        ["before 3 measure", 1],
        ["before 3 commit", 1],
        ["before 4 label", 1],
    ]
    for number, kill in enumerate(kills):
        done = command_in(tmp_path, "resume" if number else "run", kill=kill)
        assert done.returncode == KILLED, (kill, done.message)
    done = command_in(tmp_path, "resume")
    assert done.returncode == 0, done.message
    assert all_of(tmp_path / "runs/toy") == uninterrupted
    log = events(tmp_path / "log")
    generated = Counter((e["prompt"], *e["seeds"], e["version"]) for e in log if e["kind"] == "generate")
    assert len(generated) == PROMPTS + (ITERATIONS - 1) * HALF + (ITERATIONS + 1) * HELDOUT
    assert sum(generated.values()) <= len(generated) + 1, "at the kill one prompt was in the works"
    questions = Counter(json.dumps(asked) for e in log if e["kind"] == "judge" for asked in e["asked"] if asked[1:] != PROBE)
    assert sum(questions.values()) <= len(questions) + BATCH


def test_with_all_sampled_anew_it_is_the_run_without(command_in, tmp_path):
    """Bit for bit, over several passes: rows, seeds, figures, weights."""
    found = {}
    for name, knobs in (
        ("all", {"selection.rho": 1.0}),
        ("plain", {"selection.name": "shuffled"}),
    ):
        done = command_in(tmp_path / name, "run", knobs=knobs, prompts=2 * PROMPTS)
        assert done.returncode == 0, done.message
        found[name] = all_of(tmp_path / name / "runs/toy")
        for row in found[name]["figures"]["iterations"]:
            row["phases"] = [phase for phase in row["phases"] if phase != "select"]
        found[name]["tables"] = {key: table for key, table in found[name]["tables"].items() if key[1] != "selection"}
    assert found["all"] == found["plain"]


def test_with_lag_neither_the_schedule_nor_a_kill_changes_it(command_in, tmp_path):
    """What is reused was judged before the weights that sample now were trained: it is from two iterations before, or four."""
    lagged = BESIDE | {"schedule.max_lag": 1, "selection.max_age": 4}
    done = command_in(tmp_path / "beside", "run", knobs=lagged)
    assert done.returncode == 0, done.message
    run = tmp_path / "beside/runs/toy"
    ages = [t - row["reused_from"] for t, table in enumerate(rows(run, "selection"), 1) for row in table if row["reused_from"]]
    assert set(ages) in ({2}, {2, 4})
    assert len(ages) == (ITERATIONS - 2) * (PROMPTS - HALF)
    turns = lagged | {"schedule.stream": False, "schedule.evaluate_beside": False}
    folder = tmp_path / "turns"
    for number, kill in enumerate((["before 3 select", 1], ["generate", 2], ["step", 3], ["before 5 sample", 1])):
        assert command_in(folder, "resume" if number else "run", knobs=turns, kill=kill).returncode == KILLED
    done = command_in(folder, "resume", knobs=turns)
    assert done.returncode == 0, done.message
    assert all_of(folder / "runs/toy") == all_of(run)


def test_dynamic_sampling_takes_reused_prompts_like_others(command_in, tmp_path):
    """Those that come in later rounds too, over a kill among them."""
    knobs = BESIDE | {
        "algorithm.name": "grpo",
        "sampling.dynamic": True,
        "sampling.max_rounds": 2,
        "selection.max_age": 3,
        "iterations": 4,
    }
    tied = ["the film one was", "the film two was", "the film three was"]
    ends = []
    for name, kills in (("straight", ()), ("killed", (["before 3 sample", 1], ["generate", 2], ["step", 1]))):
        folder = tmp_path / name
        for number, kill in enumerate(kills):
            assert (
                command_in(folder, "resume" if number else "run", knobs=knobs, prompts=12, tied=tied, kill=kill).returncode
                == KILLED
            )
        done = command_in(folder, "resume" if kills else "run", knobs=knobs, prompts=12, tied=tied)
        assert done.returncode == 0, done.message
        ends.append([weights(folder / "runs/toy", t).tolist() for t in range(1, 5)])
    assert ends[0] == ends[1]
    with RunDirectory.open(tmp_path / "straight/runs/toy") as opened:
        records = [opened.phases(t)["sample"] for t in range(1, 5)]
        chosen = [{row["prompt_id"]: row["reused_from"] for row in opened.read(t, "selection")} for t in range(1, 5)]
    assert any(record["reused"] for record in records)
    assert any(record["rounds"] == 2 for record in records)
    for record, reused in zip(records, chosen, strict=True):
        asked = list(reused)[: record["prompts"]]
        assert sum(record["reused"].values()) == sum(reused[i] is not None for i in asked)
        assert record["samples"] == K * sum(reused[i] is None for i in asked)


def test_what_check_foretells_is_what_is_sampled_and_asked(command_in, straight, tmp_path):
    said = command_in(straight, "check")
    sampled = PROMPTS + (ITERATIONS - 1) * HALF
    assert (
        f"of {ITERATIONS * PROMPTS} prompts in {ITERATIONS} iterations at most {sampled} are sampled: {K * sampled} responses"
        in said.stdout
    )
    with RunDirectory.open(straight / "runs/toy") as opened:
        records = [opened.phases(t)["sample"] for t in range(1, ITERATIONS + 1)]
    assert sum(record["samples"] for record in records) == K * sampled


REFUSED = {
    "sampling.samples_per_prompt=1": "sampling.samples_per_prompt: ",
    "prompts.per_iteration=2": "selection.max_age: is 2, and a prompt comes again after 4 iterations or more",
    "algorithm={name: grpo, importance_sampling_cap: null}": "selection.name: is regenerate, which has responses of older policies trained",
    "algorithm={name: onpo}": "selection.name: is regenerate, which has responses of older policies trained",
    "algorithm={name: dno_prct, replay: 0.3}": "selection.name: is regenerate, and dno_prct as configured trains items of earlier",
    "selection={name: regenerate, rho: 1.0, max_age: 3}": "selection.max_age: is 3, and with rho=1 everything is sampled anew",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_work_is_refused(toy_config, onlinerl, tmp_path, change):
    config = toy_config(tmp_path, REGENERATED)
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(train.read_text().splitlines()[:PROMPTS]) + "\n")
    code, said = onlinerl("check", config, change)
    assert (code, REFUSED[change] in said) == (2, True), said
