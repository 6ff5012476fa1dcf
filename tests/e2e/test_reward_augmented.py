"""Goals in prompts, on the toy engine and learner: what is asked, scored and kept."""

from __future__ import annotations

import signal

import pytest
from toy_runs import COUNTED, PROMPTS, everything

from onlinerl.stores.directory import RunDirectory

TOLD = {
    **COUNTED,
    "algorithm.name": "reward_augmented",
    "algorithm.goal_text": "{goal}",
    "algorithm.beta": 0.3,
    "iterations": 2,
}
TOP = 8 + 8 + 16 + 10
"""The token of the goal 10: after the words that are positive, negative and neutral, and nine numbers."""


@pytest.fixture(scope="module")
def told(toy_config, warm_cli_in, counting_model, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("told")
    done = warm_cli_in(folder)("run", toy_config(folder, TOLD, model=str(counting_model)), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "an exported model expects it too: '10'" in done.stdout
    return folder


def test_samples_and_answers_are_asked_for_with_the_highest_goal_and_pairs_are_trained_with_both(told):
    with RunDirectory.open(told / "runs/toy") as run:
        for t in (1, 2):
            for table in ("rollouts", "evaluation"):
                assert {row["prompt_token_ids"][0] for row in run.read(t, table)} == {TOP}
            trained, pairs = run.phases(t)["train"], run.read(t, "pairs")
            assert trained["items"] == 2 * len(pairs) > 0
            kept = [row for row in run.read(t, "logprobs") if row["reference_logprobs"]]
            assert sum(len(row["reference_logprobs"]) for row in kept) == 2 * trained["items"]
        prompts, heldout = run.prompts("train"), run.prompts("heldout")
    assert {len({*prompt.goal_ids}) for prompt in prompts} == {10}
    assert {prompt.goal_ids for prompt in heldout} == {()}
    assert all("10" not in prompt.text for prompt in prompts)
    assert len(prompts) >= 2 * PROMPTS


@pytest.mark.parametrize("moment", ["before 2 sample", "after 1 sample", "after 2 annotate", "after 2 train"])
def test_killed_and_resumed_it_is_the_same_run(told, toy_config, warm_cli, counting_model, tmp_path, moment):
    config = toy_config(tmp_path, TOLD, model=str(counting_model))
    assert warm_cli("run", config, log=tmp_path / "log", kill=[moment, 1]).returncode == -signal.SIGKILL
    (tmp_path / "train.jsonl").unlink()  # a run keeps its prompts, goals and all
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert everything(tmp_path / "runs/toy", 2) == everything(told / "runs/toy", 2)


def test_goals_count_for_the_limits_of_prompt_and_model(toy_config, warm_cli, counting_model, tmp_path):
    config = toy_config(tmp_path, TOLD, model=str(counting_model))
    done = warm_cli("check", config, "algorithm.goal_text=" + " ".join(["the"] * 15) + " {goal}")
    assert done.returncode != 0
    assert "are longer than 16 tokens" in done.message
    longer = [
        "algorithm.goal_text=" + " ".join(["the"] * 100) + " {goal}",
        "prompts.max_tokens=200",
        "sampling.max_new_tokens=40",
    ]
    done = warm_cli("check", config, *longer)
    assert done.returncode != 0
    assert "and the model takes 128" in done.message


def test_a_model_that_cannot_tell_goals_apart_is_refused(toy_config, warm_cli, tmp_path):
    done = warm_cli("check", toy_config(tmp_path, TOLD))  # to this one all digits are one unknown word
    assert done.returncode != 0
    assert "has the same tokens with different goals" in done.message
