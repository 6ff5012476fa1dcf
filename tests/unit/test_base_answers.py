"""What the base model answered in one run, taken over by another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from values import group, groups, label

from onlinerl.errors import StoreError
from onlinerl.protocols.store import EVALUATION, EVALUATION_VERDICTS
from onlinerl.stores import base_answers, summary
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Cost


@pytest.fixture
def create(tmp_path):
    opened = []

    def make(name: str) -> RunDirectory:
        manifest = {"name": name, "config_digest": name, "fingerprint": {"algorithm.name": "dpo"}}
        opened.append(RunDirectory.create(tmp_path / name, config_yaml="", manifest=manifest))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


def measure(run: RunDirectory, answers: list, labels: list) -> None:
    for table, values in ((run.groups(0, EVALUATION), answers), (run.labels(0, EVALUATION_VERDICTS), labels)):
        table.append(values)
        table.seal()
    run.finish_phase(0, "measure", {})


def test_they_are_the_same_answers_and_verdicts(create):
    first, second = create("first"), create("second")
    measure(first, groups(3, samples=1), [label(i, float(i)) for i in range(3)])
    assert base_answers.measured(first.path)
    base_answers.take_over(second, first.path, "1")
    assert second.read(0, EVALUATION) == first.read(0, EVALUATION)
    for mine, theirs in zip(second.labels(0, EVALUATION_VERDICTS), first.labels(0, EVALUATION_VERDICTS), strict=True):
        assert (mine.reused_from, mine.saved) == ("first/iterations/0000/evaluation_verdicts", theirs.result.cost)
        assert replace(mine.result, cost=theirs.result.cost) == theirs.result
        assert mine.result.cost == Cost()
    assert second.groups(0, EVALUATION).sealed
    assert second.labels(0, EVALUATION_VERDICTS).sealed
    assert summary.taken_over(second.path)
    assert not summary.taken_over(first.path)


@pytest.mark.parametrize("now", ["2", None])
def test_what_another_version_of_the_oracle_has_judged_is_judged_again(create, now):
    first, second = create("first"), create("second")
    measure(first, groups(3, samples=1), [label(i, float(i)) for i in range(3)])
    base_answers.take_over(second, first.path, now)
    assert len(second.read(0, EVALUATION)) == 3
    assert second.read(0, EVALUATION_VERDICTS) == []
    assert not summary.taken_over(second.path)


def test_an_oracle_that_only_compares_has_judged_nothing(create):
    first, second = create("first"), create("second")
    measure(first, groups(3, samples=1), [])
    assert base_answers.measured(first.path)
    base_answers.take_over(second, first.path, "1")
    assert not summary.taken_over(second.path)


def test_what_is_not_whole_is_asked_again(create):
    failed, rejected, unfinished = create("failed"), create("rejected"), create("unfinished")
    measure(failed, groups(2, samples=1), [label(0, 1.0), label(1)])
    measure(rejected, [group(0, samples=1), group(1, samples=0, rejected=["logprob"])], [label(0, 1.0)])
    unfinished.groups(0, EVALUATION).append(groups(2, samples=1))
    assert [base_answers.measured(run.path) for run in (failed, rejected, unfinished)] == [False] * 3


def test_damaged_answers_are_not_taken_over(create):
    first, second = create("first"), create("second")
    measure(first, groups(3, samples=1), [label(i, float(i)) for i in range(3)])
    [part] = (first.path / "iterations/0000/evaluation.parquet").glob("*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(StoreError):
        base_answers.take_over(second, first.path, "1")


def test_runs_whose_prompts_say_another_goal_ask_the_base_model_anew():
    from pathlib import Path

    from onlinerl import config as configuration
    from onlinerl.sweeps.running import _base

    quickstart = Path(__file__).parents[2] / "configs/quickstart.yaml"

    def base(*overrides: str) -> dict:
        return _base(configuration.load(quickstart, list(overrides)))

    told = ["algorithm.name=reward_augmented"]
    assert base("algorithm.name=dpo") == base("algorithm.name=ipo") == base("prompts.per_iteration=3")
    assert base("algorithm.name=dpo") != base(*told)
    assert base(*told) == base(*told, "algorithm.beta=0.3")
    assert base(*told) != base(*told, "algorithm.goal_scale=5")
    members = "oracle={name: composite, members: {a: {name: sentiment}, b: {name: format, pattern: .*}}, combine: direction}"
    assert base(members) != base(members, "oracle.direction_seed=1")
