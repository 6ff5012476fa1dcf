"""Runs that are trained on steps of responses that begin alike, on the toy engine and learner."""

from __future__ import annotations

import signal

import pytest
from toy_runs import COUNTED, everything

from onlinerl.stores.directory import RunDirectory

# Sixteen responses over some forty words: a few of each prompt share their first token.
STEPS = {
    **COUNTED,
    "iterations": 2,
    "algorithm.name": "dpo",
    "algorithm.nll_coef": 0.5,
    "sampling.samples_per_prompt": 16,
    "pairing.name": "shared_prefix",
}


@pytest.fixture(scope="module")
def trained(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("steps")
    done = warm_cli_in(folder)("run", toy_config(folder, STEPS), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


def test_steps_are_kept_and_trained_from_the_first_token_that_differs(trained):
    with RunDirectory.open(trained / "runs/toy") as run:
        for t in (1, 2):
            pairs = run.read(t, "pairs")
            assert len(pairs) == run.phases(t)["train"]["items"] > 0
            tokens = {row["prompt_id"]: row["token_ids"] for row in run.read(t, "rollouts")}
            lengths: dict[str, list[int]] = {}
            for row in pairs:
                better, worse = row["steps"]
                chosen, rejected = (tokens[row["prompt_id"]][row[side]] for side in ("chosen", "rejected"))
                shared = better["start"]
                assert shared == worse["start"] > 0
                assert list(chosen[:shared]) == list(rejected[:shared])
                assert chosen[shared] != rejected[shared]
                assert row["chosen"] in better["leaves"]
                assert row["rejected"] in worse["leaves"]
                lengths.setdefault(row["prompt_id"], []).extend(step["end"] - shared for step in (better, worse))
            known = {
                row["prompt_id"]: [len(each) for each in row["reference_logprobs"] or ()] for row in run.read(t, "logprobs")
            }
            assert {name: found for name, found in known.items() if found} == lengths


@pytest.mark.parametrize("moment", ["before 2 annotate", "before 2 train"])
def test_killed_and_resumed_the_same_steps_are_trained(trained, toy_config, warm_cli, tmp_path, moment):
    assert warm_cli("run", toy_config(tmp_path, STEPS), log=tmp_path / "log", kill=[moment, 1]).returncode == -signal.SIGKILL
    assert warm_cli("resume", "runs/toy", log=tmp_path / "log").returncode == 0
    assert everything(tmp_path / "runs/toy", 2) == everything(trained / "runs/toy", 2)
