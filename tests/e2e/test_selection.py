"""Prompt selectors on the toy engine and learner: an iteration samples what was chosen, and no kill, schedule or order of arrival changes it."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything

from onlinerl.stores import summary
from onlinerl.stores.directory import RunDirectory

KILLED = -signal.SIGKILL
ITERATIONS = 4
SELECTORS = {
    "shards": {"selection.shards": 3},
    "mix": {"selection.weights": {"films": 2.0, "books": 1.0}, "selection.max_visits": 4},
    "curriculum": {"selection.by": "gap"},
    "variance": {"algorithm.name": "optune"},
    "borda": {"oracle.function": "hooks.spread", "selection.pool_mult": 2},
}
BASE = COUNTED | {"prompts.reuse": True, "iterations": ITERATIONS}


@pytest.fixture(scope="module")
def command_in(toy_config, warm_cli_in):
    """Runs or resumes in a folder, with prompts of two sources."""

    def command(where: Path, name: str, *overrides: str, knobs: dict | None = None, **spec: object):
        config = toy_config(where, BASE | (knobs or {}))
        train = where / "train.jsonl"
        rows = [json.loads(line) for line in train.read_text().splitlines()]
        said = [{**row, "source": ("films", "books")[n % 2], "difficulty": n % 5} for n, row in enumerate(rows)]
        train.write_text("".join(json.dumps(row) + "\n" for row in said))
        return warm_cli_in(where)(name, config if name == "run" else where / "runs/toy", *overrides, log=where / "log", **spec)

    return command


def selection(run: Path) -> list[list[dict]]:
    """What was chosen in each iteration."""
    with RunDirectory.open(run) as opened:
        return [opened.read(t, "selection") for t in range(1, ITERATIONS + 1)]


def sampled(run: Path) -> list[list[str]]:
    with RunDirectory.open(run) as opened:
        return [[row["prompt_id"] for row in opened.read(t, "rollouts")] for t in range(1, ITERATIONS + 1)]


def all_of(run: Path) -> dict:
    return everything(run, ITERATIONS) | {"selection": selection(run), "sampled": [sorted(ids) for ids in sampled(run)]}


@pytest.mark.parametrize("name", SELECTORS)
def test_killed_while_it_chooses_and_samples_it_is_the_same_run(command_in, tmp_path, name):
    """Killed when the choice is on the disk but not recorded, in the sampling that follows, and in the next iteration."""
    knobs = {"selection.name": name, **SELECTORS[name]}
    done = command_in(tmp_path / "straight", "run", knobs=knobs)
    assert done.returncode == 0, done.message
    expected = all_of(tmp_path / "straight/runs/toy")
    folder = tmp_path / "killed"
    kills = (["before 2 select", 1], ["generate", 3], ["before 3 sample", 1])
    for number, kill in enumerate(kills):
        assert command_in(folder, "resume" if number else "run", knobs=knobs, kill=kill).returncode == KILLED
    done = command_in(folder, "resume", knobs=knobs)
    assert done.returncode == 0, done.message
    assert all_of(folder / "runs/toy") == expected
    generated = Counter((e["prompt"], *e["seeds"], e["version"]) for e in events(folder / "log") if e["kind"] == "generate")
    assert len(generated) == ITERATIONS * PROMPTS + (ITERATIONS + 1) * HELDOUT
    assert sum(generated.values()) <= len(generated) + len(kills), "at a kill one prompt may be in the works"
    for chosen, asked in zip(expected["selection"], expected["sampled"], strict=True):
        assert sorted(row["prompt_id"] for row in chosen) == asked
    read = [row["reason"].startswith("acquisition") for chosen in expected["selection"] for row in chosen]
    assert any(read) == (name == "borda")


@pytest.fixture(scope="module")
def lagged(command_in, tmp_path_factory):
    """A run with lag that nothing happened to, its parts side by side."""
    folder = tmp_path_factory.mktemp("lagged")
    done = command_in(folder, "run", knobs=LAGGED)
    assert done.returncode == 0, done.message
    return folder / "runs/toy"


LAGGED = {
    "selection.name": "variance",
    "schedule.stream": True,
    "schedule.evaluate_beside": True,
    "schedule.max_lag": 1,
}


def test_with_lag_it_reads_what_the_weights_that_sample_were_trained_on(lagged):
    with RunDirectory.open(lagged) as opened:
        records = [opened.phases(t)["select"] for t in range(1, ITERATIONS + 1)]
    assert [record["newest"] for record in records] == [0, 0, 1, 2]
    for t, chosen in enumerate(selection(lagged), start=1):
        judged = {int(row["reason"].rpartition(" ")[2]) for row in chosen if row["reason"] != "new"}
        assert all(iteration <= max(0, t - 2) for iteration in judged)


def test_with_lag_neither_the_schedule_nor_a_kill_changes_it(command_in, lagged, tmp_path):
    turns = LAGGED | {"schedule.stream": False, "schedule.evaluate_beside": False}
    assert command_in(tmp_path, "run", knobs=turns, kill=["step", 3]).returncode == KILLED
    # What was judged meanwhile is on the disk now, and must not be read before its turn.
    done = command_in(tmp_path, "resume", knobs=turns)
    assert done.returncode == 0, done.message
    assert selection(tmp_path / "runs/toy") == selection(lagged)
    assert everything(tmp_path / "runs/toy", ITERATIONS)["weights"] == everything(lagged, ITERATIONS)["weights"]


def test_with_dynamic_sampling_others_come_from_the_same_selector(command_in, tmp_path):
    """Behind those that were chosen first, in their order."""
    knobs = {
        "algorithm.name": "grpo",
        "selection.name": "shards",
        "selection.shards": 2,
        "sampling.dynamic": True,
        "sampling.max_rounds": 2,
        "schedule.stream": True,
        "iterations": 1,
    }
    done = command_in(tmp_path / "first", "run", knobs=knobs)
    assert done.returncode == 0, done.message
    with RunDirectory.open(tmp_path / "first/runs/toy") as opened:
        order = [row["prompt_id"] for row in opened.read(1, "selection")]
        texts = {row["prompt_id"]: row["prompt"] for row in opened.read(1, "rollouts")}
    tied = [texts[i] for i in order[:3]]
    folder = tmp_path / "second"
    assert command_in(folder, "run", knobs=knobs, tied=tied, kill=["generate", HELDOUT + PROMPTS + 2]).returncode == KILLED
    done = command_in(folder, "resume", knobs=knobs, tied=tied)
    assert done.returncode == 0, done.message
    with RunDirectory.open(folder / "runs/toy") as opened:
        record, rows = opened.phases(1)["sample"], [row["prompt_id"] for row in opened.read(1, "selection")]
    assert rows == order
    assert len(order) == 2 * PROMPTS
    useful = [i for i in order if i not in order[:3]]
    assert record["rounds"] == 2
    assert record["kept"] == useful[:PROMPTS]
    assert record["next_cursor"] == 2 * PROMPTS


def test_a_run_of_the_version_before_goes_on_and_its_selector_cannot_be_changed(command_in, tmp_path):
    """Which knew no selectors: prompts in the order that they always had, and no table more."""
    straight, folder = tmp_path / "straight", tmp_path / "older"
    assert command_in(straight, "run").returncode == 0
    assert command_in(folder, "run", kill=["before 2 sample", 1]).returncode == KILLED
    run = folder / "runs/toy"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored.pop("selection") == {"name": "shuffled"}
    with RunDirectory.open(run) as opened:
        opened.write_config(yaml.safe_dump(stored, sort_keys=False))
        fingerprint = opened.manifest["fingerprint"]
        assert fingerprint.pop("selection.name") == "shuffled"
        opened.update_manifest(fingerprint=fingerprint)

    refused = command_in(folder, "resume", "selection.name=shards")
    assert refused.returncode == 2, refused.message
    assert "selection.name: was 'shuffled' when the run started and is now 'shards'" in refused.stderr
    done = command_in(folder, "resume")
    assert done.returncode == 0, done.message
    assert everything(run, ITERATIONS) == everything(straight / "runs/toy", ITERATIONS)
    assert "selection" not in summary.tables(run)


def test_the_page_of_samples_says_why_and_check_refuses_what_cannot_work(command_in, tmp_path):
    knobs = {"selection.name": "curriculum", "selection.by": "column", "iterations": 1}
    done = command_in(tmp_path, "run", knobs=knobs)
    assert done.returncode == 0, done.message
    (sample,) = summary.samples(tmp_path / "runs/toy", 1, 1)
    assert sample["selected"]["reason"].startswith("difficulty ")
    assert 0 < sample["selected"]["probability"] <= 1
    for change, said in (
        (("selection.by=gap", "prompts.reuse=false"), "config: prompts.reuse: is false, so no prompt is sampled twice"),
        (("oracle.function=hooks.compare", "selection.by=gap"), "config: selection.name: curriculum goes by the scores"),
        (("selection.name=shards", "selection.shards=9"), "config: prompts.per_iteration: is 8, and the smallest of 9 shards"),
        (("selection.name=mix", "selection.weights={films: 1}"), "config: selection.weights: does not say how often 20"),
    ):
        refused = command_in(tmp_path, "run", "name=other", *change, knobs=knobs)
        assert refused.returncode == 2, refused.message
        assert said in refused.stderr, refused.message
