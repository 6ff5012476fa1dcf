"""Dynamic sampling on the toy engine and learner: which prompts an iteration goes on with, and that no kill changes them."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
from toy_runs import BATCH, COUNTED, HELDOUT, PROBE, PROMPTS, events, everything

from onlinerl.stores import summary
from onlinerl.stores.directory import RunDirectory
from onlinerl.trackers.jsonl import read_metrics

KILLED = -signal.SIGKILL
DYNAMIC = COUNTED | {
    "algorithm.name": "grpo",
    "sampling.dynamic": True,
    "sampling.max_rounds": 3,
    "schedule.stream": True,
    "prompts.reuse": True,
    "iterations": 2,
}


def sample_records(run: Path, iterations: int = 2) -> list[dict]:
    with RunDirectory.open(run) as opened:
        return [opened.phases(t)["sample"] for t in range(1, iterations + 1)]


def texts(run: Path, iteration: int) -> dict[str, str]:
    """By id, the prompts that were sampled."""
    with RunDirectory.open(run) as opened:
        return {row["prompt_id"]: row["prompt"] for row in opened.read(iteration, "rollouts")}


@pytest.fixture(scope="module")
def command_in(toy_config, warm_cli_in):
    """Runs or resumes in a folder; `tied` are texts of prompts whose responses the oracle judges all alike."""

    def command(where: Path, name: str, *overrides: str, knobs: dict | None = None, **spec: object):
        config = toy_config(where, DYNAMIC | (knobs or {}))
        return warm_cli_in(where)(name, config if name == "run" else where / "runs/toy", *overrides, log=where / "log", **spec)

    return command


@pytest.fixture
def dynamic(command_in, tmp_path):
    """The same in a folder of the test."""
    return lambda *arguments, folder="run", **more: command_in(tmp_path / folder, *arguments, **more)


@pytest.fixture(scope="module")
def order(command_in, tmp_path_factory):
    """The texts of all 40 prompts in the order in which a run takes them."""
    folder = tmp_path_factory.mktemp("order")
    plain = {"sampling.dynamic": False, "sampling.max_rounds": None, "iterations": 5}
    done = command_in(folder, "run", knobs=plain)
    assert done.returncode == 0, done.message
    return [text for t in range(1, 6) for text in texts(folder / "runs/toy", t).values()]


@pytest.fixture(scope="module")
def straight(command_in, order, tmp_path_factory):
    """The directory of a run with these ties that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = command_in(folder, "run", tied=tied(order))
    assert done.returncode == 0, done.message
    return folder / "runs/toy"


def tied(order: list[str]) -> list[str]:
    """Three of the first eight, one of the next: 5 useful prompts after a round, 12 after two, of which the first 8 are kept."""
    return [*order[1:4], order[8]]


def test_prompts_that_teach_nothing_are_replaced_in_the_order_of_the_prompts(straight, order):
    run = straight
    first, second = sample_records(run)
    assert (first["prompts"], first["rounds"], first["useful"], first["samples"]) == (16, 2, 12, 64)
    by_id = texts(run, 1)
    assert [by_id[i] for i in first["kept"]] == [order[0], *order[4:8], *order[9:12]]
    assert (first["next_cursor"], second["prompts"], second["rounds"], second["next_cursor"]) == (16, 8, 1, 24)
    assert list(texts(run, 2).values()) == order[16:24], "the next iteration goes on behind all that was used"
    with RunDirectory.open(run) as opened:
        phases = opened.phases(1)
        assert phases["label"]["oracle_calls"] == 16
        assert phases["annotate"]["sequences"] == phases["train"]["items"] == 32
        assert [row["prompt_id"] for row in opened.read(1, "logprobs")] == first["kept"]
    shown = [sample["prompt_id"] for sample in summary.samples(run, 1, 100)]
    assert sorted(shown) == sorted(first["kept"])
    ratio = [r["value"] for r in read_metrics(run / "metrics.jsonl") if r["name"] == "sampled_per_kept"]
    assert ratio == [2.0, 1.0]


def test_arrival_does_not_matter(dynamic, straight, order, tmp_path):
    assert dynamic("run", tied=tied(order), arrival=1).returncode == 0
    assert everything(tmp_path / "run/runs/toy", 2) == everything(straight, 2)


MOMENTS = {
    "in-the-first-round": ["generate", HELDOUT + 3],
    "in-the-second-round": ["generate", HELDOUT + PROMPTS + 3],
    "first-verdicts": ["judge", 1 + 3 + 1],
    "verdicts-of-the-first-round": ["judge", 1 + 3 + 4],
    "sampled": ["before 1 sample", 1],
    "recorded": ["after 1 sample", 1],
    "judged": ["before 1 label", 1],
    "annotated": ["before 1 annotate", 1],
    "trained": ["after 1 train", 1],
    "in-the-next-iteration": ["before 2 sample", 1],
}


@pytest.mark.parametrize("kill", MOMENTS.values(), ids=MOMENTS)
def test_killed_anywhere_it_asks_for_nothing_twice_and_uses_the_same_prompts(dynamic, straight, order, tmp_path, kill):
    ties = tied(order)
    assert dynamic("run", tied=ties, kill=kill).returncode == KILLED
    done = dynamic("resume", tied=ties)
    assert done.returncode == 0, done.message
    happened = events(tmp_path / "run/log")
    generated = Counter((e["prompt"], *e["seeds"], e["version"]) for e in happened if e["kind"] == "generate")
    asked = Counter(one[0] for e in happened if e["kind"] == "judge" for one in e["asked"] if one[1:] != PROBE and len(one) > 2)
    assert len(generated) == 16 + 8 + 3 * HELDOUT
    assert sum(generated.values()) <= len(generated) + 1, "at a kill one prompt may be in the works"
    assert len(asked) == 24
    assert sum(asked.values()) <= 24 + BATCH, "and one call"
    assert everything(tmp_path / "run/runs/toy", 2) == everything(straight, 2)
    counts = ("kept", "prompts", "samples", "useful", "rounds", "next_cursor")
    expected, got = ([[r[k] for k in counts] for r in sample_records(run)] for run in (straight, tmp_path / "run/runs/toy"))
    assert got == expected


def test_with_too_few_useful_prompts_it_goes_on_and_says_so(dynamic, order, tmp_path):
    run = tmp_path / "run/runs/toy"
    done = dynamic("run", tied=order[3:24])
    assert done.returncode == 0, done.message
    said = " ".join(done.stdout.split())
    assert "iteration 1: of 24 prompts in 3 rounds, the oracle tells the responses to 3 apart, and 8 were wanted" in said
    first, second = sample_records(run)
    by_id = texts(run, 1)
    assert [by_id[i] for i in first["kept"]] == order[:3]
    assert (first["next_cursor"], second["prompts"]) == (24, 8)


def test_without_any_useful_prompt_an_iteration_is_idle_and_the_next_one_trains(dynamic, order, tmp_path):
    run = tmp_path / "run/runs/toy"
    ties = order[:24]
    assert dynamic("run", tied=ties, folder="straight").returncode == 0
    assert dynamic("run", tied=ties, kill=["after 1 annotate", 1]).returncode == KILLED
    done = dynamic("resume", tied=ties)
    assert done.returncode == 0, done.message
    rows = summary.summarise(run)["iterations"]
    assert [row["status"] for row in rows] == ["promoted", "keep", "promoted"]
    assert rows[1]["idle"].startswith("all 24 prompts that were sampled are ties")
    assert everything(run, 2) == everything(tmp_path / "straight/runs/toy", 2)


def test_a_prompt_that_the_oracle_failed_on_is_replaced_too(dynamic, tmp_path):
    run = tmp_path / "run/runs/toy"
    done = dynamic("run", "iterations=1", "max_failed_labels=1.0", down=["judge", 1 + 3 + 1])
    assert done.returncode == 0, done.message
    (record,) = sample_records(run, 1)
    with RunDirectory.open(run) as opened:
        failures = opened.phases(1)["label"]["failures"]
        judged = {row["prompt_id"] for row in opened.read(1, "logprobs")}
    assert failures > 0
    assert (record["rounds"], record["useful"]) == (2, 16 - failures)
    assert judged == set(record["kept"])


def test_no_prompt_comes_twice_in_an_iteration(dynamic, order, tmp_path):
    """There are 40, and 6 rounds of 8 would be more."""
    done = dynamic("run", "iterations=1", tied=order[1:], knobs={"sampling.max_rounds": 6})
    assert done.returncode == 0, done.message
    (record,) = sample_records(tmp_path / "run/runs/toy", 1)
    assert (record["prompts"], record["rounds"], len(record["kept"])) == (40, 5, 1)


@pytest.mark.parametrize("algorithm", ["dapo", "dpo"])
def test_with_lag_and_for_other_algorithms(dynamic, order, tmp_path, algorithm):
    knobs = {"algorithm.name": algorithm, "schedule.max_lag": 1, "iterations": 3}
    knobs |= {"sampling.dynamic": None} if algorithm == "dapo" else {}
    assert dynamic("run", folder="straight", tied=tied(order), knobs=knobs).returncode == 0
    assert dynamic("run", tied=tied(order), knobs=knobs, kill=["generate", HELDOUT + PROMPTS + 3]).returncode == KILLED
    done = dynamic("resume", tied=tied(order))
    assert done.returncode == 0, done.message
    assert [r["rounds"] for r in sample_records(tmp_path / "run/runs/toy", 3)] == [2, 1, 1]
    assert everything(tmp_path / "run/runs/toy") == everything(tmp_path / "straight/runs/toy")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["schedule.stream=false"], "schedule.stream"),
        (["prompts.reuse=false"], "sampling.max_rounds"),
        (["sampling.dynamic=false"], "sampling.max_rounds"),
        (["algorithm.name=ppo", "sampling.samples_per_prompt=1"], "sampling.dynamic"),
    ],
)
def test_what_cannot_work_is_refused(dynamic, overrides, field):
    refused = dynamic("run", *overrides)
    assert refused.returncode == 2, refused.message
    assert f"config: {field}: " in refused.stderr
