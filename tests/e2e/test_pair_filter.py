"""Pairs that are filtered by what the learner says of them, and a KL on samples beside them, on the toy engine and learner."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from toy_runs import COUNTED, everything

from onlinerl.algorithms.dpo import Dpo
from onlinerl.controller import items as items_file
from onlinerl.errors import LearnerError
from onlinerl.stores.directory import RunDirectory

FILTERED = {
    **COUNTED,
    "iterations": 3,
    "algorithm.pair_filter": {"ches_share": 0.3, "max_reference_margin": 20.0, "margin": 0.05},
    "algorithm.online_kl": 0.01,
    "algorithm.online_kl_samples": 3,
}


def trained(run, iteration: int) -> dict:
    with RunDirectory.open(run) as opened:
        return opened.phases(iteration)["train"]


@pytest.fixture(scope="module")
def filtered(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("filtered")
    done = warm_cli_in(folder)("run", toy_config(folder, FILTERED), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


def test_what_is_left_out_is_counted(filtered):
    run = filtered / "runs/toy"
    for t in (1, 2, 3):
        record = trained(run, t)
        assert record["items"] > 0
        # 30 % of those that the other filters have left.
        assert record["dropped"]["ches"] == int(0.3 * (record["items"] + record["dropped"]["ches"]))
        with RunDirectory.open(run) as opened:
            rows = opened.read(t, "logprobs")
        assert all([len(ches) for ches in row["ches"]] == [2, *[0] * (len(row["ches"]) - 1)] for row in rows if row["ches"])
        assert sum(bool(row["ches"]) for row in rows) == record["items"] + record["dropped"]["ches"] + record["dropped"].get(
            "reference_margin", 0
        )


@pytest.mark.parametrize("moment", ["before 2 annotate", "after 2 annotate", "before 2 train", "after 2 train"])
def test_a_run_that_is_killed_trains_on_the_same_pairs(filtered, toy_config, warm_cli, tmp_path, moment):
    done = warm_cli("run", toy_config(tmp_path, FILTERED), log=tmp_path / "log", kill=[moment, 1])
    assert done.returncode == -signal.SIGKILL
    assert warm_cli("resume", "runs/toy", log=tmp_path / "log").returncode == 0
    assert everything(tmp_path / "runs/toy") == everything(filtered / "runs/toy")


def test_where_nothing_passes_the_iterate_is_kept_and_the_reasons_are_said(toy_config, warm_cli, tmp_path):
    strict = {"algorithm.pair_filter": {"max_reference_margin": -1e6}, "iterations": 2, "training.max_idle_iterations": 3}
    done = warm_cli("run", toy_config(tmp_path, strict))
    assert done.returncode == 0, done.message
    record = trained(tmp_path / "runs/toy", 1)
    assert (record["items"], record["steps"]) == (0, 0)
    assert "reference_margin" in record["idle"]


@pytest.mark.parametrize("made", [[1, 0], [0, 0], [7], None, "ab"])
def test_places_that_there_are_not_are_refused(made):
    class Wrong(Dpo):
        def select(self, items):
            return None if made is None else (made, {})

    class It:
        class parts:  # noqa: N801
            algorithm = Wrong()

    class Built:
        items = ("a", "b")
        dropped: dict = {}  # noqa: RUF012

    with pytest.raises(LearnerError, match="select"):
        items_file.selected(It, Built)


def test_ches_by_hand():
    """Hidden states of the toy are its tokens: (5, 1, 2) and (5, 3): a = {5, 1}, b = {5}; <a, b> - |a|^2 = 1 - 2."""
    from onlinerl.controller.phases.annotate import _ches
    from onlinerl.learners.toy import ToyLearner
    from onlinerl.types import TrainItem, TrainSequence

    class It:
        class parts:  # noqa: N801
            learner = ToyLearner(8, Dpo(), "base")

    one, other = (TrainSequence(prompt_ids=(7, 5), response_ids=ids) for ids in ((1, 2), (3,)))
    same, third = TrainSequence(prompt_ids=(7, 5), response_ids=(1, 2)), TrainSequence(prompt_ids=(7,), response_ids=(4,))
    found = _ches(
        It, [TrainItem(prompt_id="p", sequences=(one, other)), TrainItem(prompt_id="p", sequences=(one, same, third))]
    )
    assert [len(ches) for ches in found] == [2, 0, 2, 0, 0]
    assert found[0].tolist() == pytest.approx([-1.0, 1 / 2 - 2 / 4])
    assert found[2].tolist() == [0.0, 0.0], "of a response with itself"
    # Nothing in common: -|a|^2.
    apart = _ches(It, [TrainItem(prompt_id="p", sequences=(one, third))])
    assert np.allclose(apart[0], [-2.0, -0.5])
