"""Runs of an algorithm that asks for responses of a mixture of policy and reference, which the learner draws: what they are, and what
survives a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything, weights

from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

ITERATIONS, K, WEIGHT = 3, 3, 0.375
KILLED = -signal.SIGKILL
NASH = {
    **COUNTED,
    "algorithm.name": "nash_md",
    "algorithm.mixture_coef": WEIGHT,
    "algorithm.mixture_samples": 2,
    "sampling.samples_per_prompt": K,
    "sampling.temperature": 0.8,
}


def rows(run: Path, iteration: int, table: str = "rollouts") -> list[dict]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, table)


@pytest.fixture(scope="module")
def mixed(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("mixed")
    done = warm_cli_in(folder)("run", toy_config(folder, NASH), log=folder / "log")
    assert done.returncode == 0, done.message
    assert f"8 prompts x ({K} samples + 2 mixture responses) -> at most {PROMPTS * K} items" in done.stdout
    assert "the learner draws 16 responses of the mixture an iteration itself" in done.stdout
    return folder


def normalized(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def test_responses_of_the_mixture_join_the_groups(mixed):
    """Their log-probs are those of the geometric mixture at the temperature, and what the oracle sees of them is their text."""
    run = mixed / "runs/toy"
    for t in range(1, ITERATIONS + 1):
        base = np.zeros(len(weights(run, 1)))
        policy = weights(run, t - 1) if t > 1 else base
        expected = normalized(((1 - WEIGHT) * policy + WEIGHT * base) / 0.8)
        kept = {row["prompt_id"]: row for row in rows(run, t, "mixture_rollouts")}
        for row in rows(run, t):
            assert row["sources"] == ["policy"] * K + ["mixture"] * 2
            assert row["policy_versions"] == [t - 1] * (K + 2)
            assert row["texts"][K:] == kept[row["prompt_id"]]["texts"]
            assert len({*row["seeds"]}) == K + 2
            for tokens, logprobs in zip(row["token_ids"][K:], row["logprobs"][K:], strict=True):
                assert logprobs == pytest.approx(expected[tokens].tolist(), abs=1e-6)
            for tokens, logprobs in zip(row["token_ids"][:K], row["logprobs"][:K], strict=True):
                assert logprobs == pytest.approx(normalized(policy / 0.8)[tokens].tolist(), abs=1e-6)
    asked = [one for e in events(mixed / "log") if e["kind"] == "judge" for one in e["asked"]]
    assert sum(len(one) == 1 + K + 2 for one in asked) == ITERATIONS * PROMPTS, "all of them are judged together"


def test_the_policy_s_responses_are_trained_and_nothing_is_pushed_for_the_mixture(mixed):
    run = mixed / "runs/toy"
    with RunDirectory.open(run) as opened:
        records = [opened.phases(t) for t in range(1, ITERATIONS + 1)]
    assert [[*record][:2] for record in records] == [["sample_mixture", "sample"]] * ITERATIONS
    for t, record in enumerate(records, start=1):
        said = record["sample_mixture"]
        assert (said["samples"], said["policy_version"], said["reference"], said["weight"]) == (2 * PROMPTS, t - 1, 0, WEIGHT)
        assert record["train"]["items"] == PROMPTS * K
        assert record["train"]["sampled_by"] == [t - 1]
    assert [e["version"] for e in events(mixed / "log") if e["kind"] == "push"] == [0, 1, 2, 3]
    assert all(row["sync"]["proved"] for row in summarise(run)["iterations"])


FIRST = HELDOUT + PROMPTS + HELDOUT
"""Groups that are sampled before iteration 2."""
MOMENTS = {
    "before the mixture is drawn": ["after 1 commit", 1],
    "when it has been drawn": ["before 2 sample_mixture", 1],
    "when that is recorded": ["after 2 sample_mixture", 1],
    "while the policy is sampled": ["generate", FIRST + 3],
    "before the policy's are recorded": ["before 2 sample", 1],
    "before training is recorded": ["before 2 train", 1],
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("schedule", [[], ["schedule.stream=true", "schedule.evaluate_beside=true"]], ids=["in turn", "beside"])
def test_killed_and_resumed(mixed, toy_config, warm_cli, tmp_path, moment, schedule):
    """The same responses of the mixture and of the policy, and the same weights."""
    command = ("run", toy_config(tmp_path, NASH), *schedule)
    assert warm_cli(*command, log=tmp_path / "log", kill=MOMENTS[moment]).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    ours, theirs = everything(tmp_path / "runs/toy"), everything(mixed / "runs/toy")
    assert [ours[key] for key in ("weights", "metrics")] == [theirs[key] for key in ("weights", "metrics")]
    for table in ("rollouts", "mixture_rollouts"):
        assert [rows(tmp_path / "runs/toy", t, table) for t in (1, 2, 3)] == [
            rows(mixed / "runs/toy", t, table) for t in (1, 2, 3)
        ]


def test_a_chunk_that_a_kill_has_cut_is_drawn_again_whole(mixed, toy_config, warm_cli, tmp_path):
    """Half of its rows are on the disk: they stay, and the others are as they would have been."""
    command = ("run", toy_config(tmp_path, NASH))
    assert warm_cli(*command, log=tmp_path / "log", kill=["drawn", 2], half=True).returncode == KILLED
    assert len(rows(tmp_path / "runs/toy", 2, "mixture_rollouts")) == PROMPTS // 2
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert rows(tmp_path / "runs/toy", 2, "rollouts") == rows(mixed / "runs/toy", 2, "rollouts")


def test_a_mixture_of_nothing_but_the_policy_is_self_play(toy_config, warm_cli, tmp_path):
    done = warm_cli("run", toy_config(tmp_path, NASH), "algorithm.mixture_coef=0.0", "iterations=2", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    expected = normalized(weights(tmp_path / "runs/toy", 1) / 0.8)
    for row in rows(tmp_path / "runs/toy", 2):
        assert row["logprobs"][K] == pytest.approx(expected[row["token_ids"][K]].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["schedule.max_lag=1", "schedule.evaluate_beside=true"], "schedule.max_lag: is 1, and nash_md asks the learner for"),
        (
            ["sampling.dynamic=true", "schedule.stream=true"],
            "sampling.dynamic: is true, and nash_md has responses of a mixture",
        ),
        (["sampling.top_p=0.9"], "sampling.top_p"),
        (["reference.schedule=none"], "reference.schedule"),
        (["algorithm.mixture_coef=1.5"], "algorithm.mixture_coef"),
    ],
)
def test_where_the_learner_cannot_draw_them_it_is_refused(toy_config, warm_cli, tmp_path, overrides, said):
    done = warm_cli("check", toy_config(tmp_path, NASH), *overrides)
    assert done.returncode != 0
    assert said in done.message


def test_pairs_of_two_responses_of_the_mixture_are_trained(toy_config, warm_cli, tmp_path):
    """`ipo_md`: those of the policy are judged with them and not trained, nor counted as left out where no pair is made of them alone."""
    keys = {
        **COUNTED,
        "algorithm.name": "ipo_md",
        "algorithm.mixture_coef": WEIGHT,
        "sampling.samples_per_prompt": 1,
        "iterations": 2,
    }
    done = warm_cli("run", toy_config(tmp_path, keys), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert "8 prompts x (1 sample + 2 mixture responses) -> at most 8 pairs" in done.stdout
    for t in (1, 2):
        sources = {row["prompt_id"]: row["sources"] for row in rows(tmp_path / "runs/toy", t)}
        assert {tuple(own) for own in sources.values()} == {("policy", "mixture", "mixture")}
        made = rows(tmp_path / "runs/toy", t, "pairs")
        mixed = [
            row for row in made if {sources[row["prompt_id"]][row[side]] for side in ("chosen", "rejected")} == {"mixture"}
        ]
        with RunDirectory.open(tmp_path / "runs/toy") as opened:
            record = opened.phases(t)["train"]
        assert 0 < record["items"] == len(mixed) < len(made)
        assert record["dropped"]["not_mixture"] == len(made) - len(mixed)
        assert record["sampled_by"] == [t - 1]
