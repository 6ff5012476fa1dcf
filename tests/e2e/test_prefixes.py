"""Runs whose responses begin with a part of a stored answer: what is asked for, what is kept, what is trained, what survives a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything

from onlinerl.stores.directory import RunDirectory

KILLED = -signal.SIGKILL
ANSWER = "the actor was nice and the plot was superb"
RESET = {**COUNTED, "algorithm.name": "dr_po", "algorithm.p_reset": 0.6, "algorithm.mask_value": False}
MAX_NEW = 12


def rollouts(run: Path, iteration: int) -> list[dict]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, "rollouts")


@pytest.fixture(scope="module")
def reset(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reset")
    done = warm_cli_in(folder)("run", toy_config(folder, RESET, answer=ANSWER), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder


def test_a_share_of_the_groups_begins_with_a_part_of_the_answer(reset):
    """All responses of a group with the same tokens, which have no log-probs; the text is that of the whole response."""
    run = reset / "runs/toy"
    with RunDirectory.open(run) as opened:
        answers = {prompt.id: prompt.answer_ids for prompt in opened.prompts("train")}
    cuts = []
    for t in (1, 2, 3):
        for row in rollouts(run, t):
            (prefix,) = {tuple(each) for each in row["prefix_ids"]}
            cuts.append(len(prefix))
            assert prefix == answers[row["prompt_id"]][: len(prefix)]
            assert len(prefix) < len(answers[row["prompt_id"]])
            for tokens, logprobs, text, sampler in zip(
                row["token_ids"], row["logprobs"], row["texts"], row["samplers"], strict=True
            ):
                assert 0 < len(tokens) == len(logprobs) <= MAX_NEW - len(prefix) == sampler["max_new_tokens"]
                assert len(prefix) < 3 or "actor" in text
    assert 0.3 < sum(map(bool, cuts)) / len(cuts) < 0.9
    assert len({*cuts}) > 4, "cut in many places"
    with RunDirectory.open(run) as opened:
        assert all(not any(row["prefix_ids"]) for row in opened.read(1, "evaluation")), "the policy answers by itself"


def test_whole_texts_are_judged(reset):
    whole = {text for t in (1, 2, 3) for row in rollouts(reset / "runs/toy", t) for text in row["texts"]}
    asked = {
        text for e in events(reset / "log") if e["kind"] == "judge" for one in e["asked"] if len(one) == 5 for text in one[1:]
    }
    assert whole <= asked


def test_log_probs_are_kept_of_forced_tokens_too_where_the_critic_learns_from_them(reset):
    with RunDirectory.open(reset / "runs/toy") as opened:
        for row, known in zip(opened.read(1, "rollouts"), opened.read(1, "logprobs"), strict=True):
            assert row["prompt_id"] == known["prompt_id"]
            lengths = [len(p) + len(t) for p, t in zip(row["prefix_ids"], row["token_ids"], strict=True)]
            assert [len(each) for each in known["values"]] == lengths


FIRST = HELDOUT + PROMPTS + HELDOUT


@pytest.mark.parametrize(
    "moment", [["generate", FIRST + 3], ["before 2 sample", 1], ["after 2 sample", 1], ["before 2 train", 1]]
)
@pytest.mark.parametrize("schedule", [[], ["schedule.stream=true", "schedule.evaluate_beside=true"]], ids=["in turn", "beside"])
def test_killed_and_resumed(reset, toy_config, warm_cli, tmp_path, moment, schedule):
    """The same prefixes, the same responses, the same weights."""
    command = ("run", toy_config(tmp_path, RESET, answer=ANSWER), *schedule)
    assert warm_cli(*command, log=tmp_path / "log", kill=moment).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    ours, theirs = everything(tmp_path / "runs/toy"), everything(reset / "runs/toy")
    assert [ours[key] for key in ("weights", "metrics")] == [theirs[key] for key in ("weights", "metrics")]
    assert [rollouts(tmp_path / "runs/toy", t) for t in (1, 2, 3)] == [rollouts(reset / "runs/toy", t) for t in (1, 2, 3)]


def test_without_resets_the_run_is_that_of_ppo(toy_config, warm_cli, tmp_path):
    off = ["algorithm.p_reset=0.0", "algorithm.missing_eos_score=null"]
    for name, algorithm, more in (("resets", "dr_po", off), ("plain", "ppo", [])):
        config = toy_config(tmp_path, {**COUNTED, "algorithm.name": algorithm}, name=name, file=f"{name}.yaml", answer=ANSWER)
        done = warm_cli("run", config, "iterations=2", *more, log=tmp_path / "log")
        assert done.returncode == 0, done.message
    one, other = (everything(tmp_path / "runs" / name, iterations=2) for name in ("resets", "plain"))
    assert one["weights"] == other["weights"]


def test_with_lag_and_a_group_baseline(toy_config, warm_cli, tmp_path):
    config = toy_config(tmp_path, {**COUNTED, "algorithm.name": "grpo", "algorithm.p_reset": 1.0}, answer=ANSWER)
    done = warm_cli(
        "run", config, "schedule.max_lag=1", "schedule.evaluate_beside=true", "schedule.stream=true", log=tmp_path / "log"
    )
    assert done.returncode == 0, done.message
    assert all(all(row["prefix_ids"]) for row in rollouts(tmp_path / "runs/toy", 2))


def test_an_engine_that_ignores_prefixes_is_noticed(toy_config, warm_cli, tmp_path):
    done = warm_cli("run", toy_config(tmp_path, RESET, answer=ANSWER), log=tmp_path / "log", broken="prefix")
    assert done.returncode != 0
    assert "a response says that it begins with 0 given tokens" in done.message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.name=openai", "learner.name=torch"], "of which this engine does not give the whole text"),
        (["sampling.max_new_tokens=1"], "sampling.max_new_tokens: is 1"),
        (["algorithm.p_reset=1.5"], "algorithm.p_reset"),
    ],
)
def test_what_cannot_begin_with_an_answer_is_refused(toy_config, warm_cli, tmp_path, overrides, said):
    done = warm_cli("check", toy_config(tmp_path, RESET, answer=ANSWER), *overrides)
    assert done.returncode != 0
    assert said in done.message


def test_prompts_without_answers_are_refused(toy_config, warm_cli, tmp_path):
    done = warm_cli("check", toy_config(tmp_path, RESET))
    assert done.returncode != 0
    assert "have no reference answer, which the algorithm needs" in done.message
