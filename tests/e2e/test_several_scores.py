"""Runs of an algorithm that reads several scores of each response: what is kept of them, and that multipliers go on over kills."""

from __future__ import annotations

import signal

import pytest
from toy_runs import COUNTED, everything

from onlinerl.ops.multipliers import after, weight
from onlinerl.stores.directory import RunDirectory

KILLED = -signal.SIGKILL
LIMITS = {"length": 40.0, "vowels": 9.0}
SEVERAL = {
    **COUNTED,
    "oracle.function": "hooks.named",
    "algorithm.name": "constrained",
    "algorithm.form": "cost",
    "algorithm.objective": "score",
    "algorithm.thresholds": LIMITS,
    "algorithm.multiplier_lr": 0.05,
    "algorithm.kl_coef": 0.01,
}


@pytest.fixture(scope="module")
def straight(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("several")
    done = warm_cli_in(folder)("run", toy_config(folder, SEVERAL), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "a multiplier takes one step per iteration" in done.stdout
    return folder


def records(run):
    with RunDirectory.open(run) as opened:
        return [opened.phases(t)["train"] for t in (1, 2, 3)]


def test_multipliers_follow_from_the_means_of_the_scores(straight):
    run = straight / "runs/toy"
    with RunDirectory.open(run) as opened:
        rows = [opened.read(t, "verdicts") for t in (1, 2, 3)]
    for iteration in rows:
        assert all([each["name"] for each in row["components"]] == list(LIMITS) for row in iteration)
    figures = [record["figures"] for record in records(run)]
    for t, (iteration, said) in enumerate(zip(rows, figures, strict=True)):
        named = [{each["name"]: each["scores"] for each in row["components"]} for row in iteration]
        for name in LIMITS:
            values = [value for one in named for value in one[name]]
            assert said[f"mean_{name}"] == pytest.approx(sum(values) / len(values))
        means = [{name: f[f"mean_{name}"] for name in LIMITS} for f in figures[:t]]
        u = after("cost", LIMITS, means, u0=dict.fromkeys(LIMITS, 0.0), rate=0.05)
        assert {name: said[f"multiplier_{name}"] for name in LIMITS} == {n: weight("cost", each) for n, each in u.items()}
    assert figures[0]["multiplier_length"] == 1.0
    assert len({f["multiplier_length"] for f in figures}) == 3


@pytest.mark.parametrize("moment", [["judge", 4], ["before 2 train", 1], ["after 2 train", 1], ["before 3 label", 1]])
def test_a_resume_goes_on_with_the_same_multipliers(straight, toy_config, warm_cli, tmp_path, moment):
    """The same weights to the last bit, and the same figures."""
    config = toy_config(tmp_path, SEVERAL)
    assert warm_cli("run", config, log=tmp_path / "log", kill=moment).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert everything(tmp_path / "runs/toy") == everything(straight / "runs/toy")
    ours, theirs = ([record["figures"] for record in records(each / "runs/toy")] for each in (tmp_path, straight))
    assert ours == theirs


def test_with_lag_multipliers_are_those_of_the_iteration_before(toy_config, warm_cli, tmp_path):
    config = toy_config(tmp_path, SEVERAL)
    done = warm_cli(
        "run", config, "schedule.max_lag=1", "schedule.evaluate_beside=true", "schedule.stream=true", log=tmp_path / "log"
    )
    assert done.returncode == 0, done.message
    figures = [record["figures"] for record in records(tmp_path / "runs/toy")]
    assert len({f["multiplier_length"] for f in figures}) == 3


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_oracle_that_gives_one_score_only_is_refused(toy_config, warm_cli, tmp_path, command):
    done = warm_cli(command, toy_config(tmp_path, SEVERAL | {"oracle.function": "hooks.judge"}), log=tmp_path / "log")
    assert done.returncode != 0
    assert "python gives one score only, and constrained as configured reads length, vowels" in done.message
    assert not (tmp_path / "runs/toy").exists()


def test_a_group_without_one_of_the_scores_is_left_out_and_counted(toy_config, warm_cli, tmp_path):
    (tmp_path / "forgets.py").write_text(
        "import zlib\n\nimport hooks\n\n\ndef judge(groups):\n"
        "    made = hooks.named(groups)\n"
        "    for group, entry in zip(groups, made):\n"
        "        if zlib.crc32(group['prompt'].encode()) % 2 and len(group['responses']) > 2:\n"
        "            del entry['vowels']\n"
        "    return made\n"
    )
    config = toy_config(tmp_path, SEVERAL | {"oracle.function": "forgets.judge", "algorithm.kl_coef": 0.0}, iterations=1)
    done = warm_cli("run", config, log=tmp_path / "log")
    assert done.returncode == 0, done.message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        record, rows = run.phases(1)["train"], run.read(1, "verdicts")
    without = sum([each["name"] for each in row["components"]] == ["length"] for row in rows)
    assert 0 < without < len(rows)
    assert record["dropped"]["no_component"] == without
    assert record["items"] == 4 * (len(rows) - without)
