"""An oracle that judges several times, on the toy engine and learner."""

from __future__ import annotations

import math
import signal

import pytest
from toy_runs import COUNTED, everything

from onlinerl.stores.directory import RunDirectory

UPO = {**COUNTED, "oracle.function": "hooks.doubt", "algorithm.name": "upo", "iterations": 2}


@pytest.fixture(scope="module")
def doubted(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("doubted")
    done = warm_cli_in(folder)("run", toy_config(folder, UPO), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


def test_uncertainties_are_kept_and_pairs_left_out_by_them_are_counted(doubted):
    with RunDirectory.open(doubted / "runs/toy") as run:
        for t in (1, 2):
            nats = [cell for row in run.read(t, "verdicts") for line in row["uncertainty"] for cell in line]
            assert 0 <= min(nats) < max(nats) <= math.log(2)
            record = run.phases(t)["train"]
            assert record["items"] + record["dropped"].get("uncertain", 0) <= 8
            assert record["items"] > 0


@pytest.mark.parametrize("moment", ["after 2 label", "before 2 train"])
def test_killed_and_resumed_the_same_pairs_are_kept(doubted, toy_config, warm_cli, tmp_path, moment):
    assert warm_cli("run", toy_config(tmp_path, UPO), log=tmp_path / "log", kill=[moment, 1]).returncode == -signal.SIGKILL
    assert warm_cli("resume", "runs/toy", log=tmp_path / "log").returncode == 0
    assert everything(tmp_path / "runs/toy", 2) == everything(doubted / "runs/toy", 2)


def test_an_oracle_that_judges_once_is_refused(toy_config, warm_cli, tmp_path):
    done = warm_cli("check", toy_config(tmp_path, {"algorithm.name": "upo"}))
    assert done.returncode == 2
    assert "sentiment as configured judges each pair once" in done.message
    assert "oracle.dropout_passes=10" in done.message


def test_the_filter_of_the_pair_builder_leaves_out_the_same_pairs_for_another_loss(toy_config, warm_cli_in, tmp_path):
    """Of the same responses, which are the base model's; the judges agree well, so that the filter must be a strict one."""
    of_the_builder = {"pairing.name": "halves", "pairing.uncertainty_filter": {"mu": 300.0, "unfiltered": 0.0}}
    records = []
    for knobs in ({"algorithm.mu": 300.0}, {"algorithm.name": "sppo_hard", **of_the_builder}):
        folder = tmp_path / f"{len(records)}"
        done = warm_cli_in(folder)("run", toy_config(folder, {**UPO, **knobs, "iterations": 1}), log=folder / "log")
        assert done.returncode == 0, done.message
        with RunDirectory.open(folder / "runs/toy") as run:
            records.append(run.phases(1)["train"])
    assert records[1]["items"] == records[0]["items"] > 0
    assert records[1]["dropped"]["uncertain"] == records[0]["dropped"]["uncertain"] > 0


def test_the_filter_is_refused_with_an_oracle_that_judges_once(toy_config, warm_cli, tmp_path):
    done = warm_cli("check", toy_config(tmp_path, {"pairing.uncertainty_filter": {"mu": 1.0}}))
    assert done.returncode == 2
    assert "pairing.uncertainty_filter.mu filters pairs" in done.message
