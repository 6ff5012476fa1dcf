"""Runs of algorithms that ask for other responses beside the policy's samples: what is sampled, what is trained, what survives a kill."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from toy_runs import COUNTED, HELDOUT, PROMPTS, events, everything, weights

from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.summary import summarise

ITERATIONS, K = 3, 4
KILLED = -signal.SIGKILL
SELM = {**COUNTED, "algorithm.name": "selm", "iterations": ITERATIONS}


def rollouts(run: Path, iteration: int) -> list[dict]:
    with RunDirectory.open(run) as opened:
        return opened.read(iteration, "rollouts")


def generated(log: Path) -> Counter:
    """How often each prompt was answered by which version, with which seeds."""
    return Counter((e["prompt"], *e["seeds"], e["version"]) for e in events(log) if e["kind"] == "generate")


@pytest.fixture(scope="module")
def greedy(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run of selm that nothing happened to."""
    folder = tmp_path_factory.mktemp("greedy")
    done = warm_cli_in(folder)("run", toy_config(folder, SELM), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "8 prompts x (4 samples + 1 greedy response) -> at most 8 pairs" in done.stdout
    return folder


def test_a_greedy_response_joins_each_group(greedy):
    """It is the likeliest token at each position, of the policy that sampled, under a seed of its own."""
    run = greedy / "runs/toy"
    assert [row["samples"] for row in summarise(run)["iterations"][1:]] == [PROMPTS * (K + 1)] * ITERATIONS
    for t in range(1, ITERATIONS + 1):
        logits = weights(run, t - 1) if t > 1 else np.zeros_like(weights(run, 1))
        for row in rollouts(run, t):
            assert row["sources"] == ["policy"] * K + ["greedy"]
            assert [sampler["temperature"] for sampler in row["samplers"]] == [1.0] * K + [0.0]
            assert {*row["token_ids"][K]} == {int(logits.argmax())}
            logprob = logits.max() - np.log(np.exp(logits).sum())
            assert row["logprobs"][K] == pytest.approx([logprob] * len(row["logprobs"][K]), abs=1e-5), "at temperature 1"
            assert len({*row["seeds"]}) == K + 1
    assert sum(generated(greedy / "log").values()) == ITERATIONS * PROMPTS + (ITERATIONS + 1) * HELDOUT
    asked = [one for e in events(greedy / "log") if e["kind"] == "judge" for one in e["asked"]]
    assert sum(len(one) == 1 + K + 1 for one in asked) == ITERATIONS * PROMPTS, "all of them are judged together"


def test_the_greedy_response_is_lowered(greedy, toy_config, warm_cli):
    """Against a run without optimism, from the same samples."""
    log, config = greedy / "log2", toy_config(greedy, SELM, name="plain", file="plain.yaml")
    assert warm_cli("run", config, "algorithm.optimism=0.0", "iterations=1", log=log).returncode == 0
    config = toy_config(greedy, SELM, name="strong", file="strong.yaml")
    assert warm_cli("run", config, "algorithm.optimism=20.0", "iterations=1", log=log).returncode == 0
    plain, strong = (weights(greedy / "runs" / name, 1) for name in ("plain", "strong"))
    likeliest = rollouts(greedy / "runs/plain", 1)[0]["token_ids"][K][0]
    assert strong[likeliest] < plain[likeliest]


@pytest.mark.parametrize("moment", ["in its middle", "before 2 sample", "after 2 sample"])
def test_killed_while_it_samples(greedy, toy_config, warm_cli, tmp_path, moment):
    """No response is lost and none is asked for twice, but for the group that was in the works."""
    inside = ["generate", HELDOUT + PROMPTS + HELDOUT + 3]
    kill = inside if moment == "in its middle" else [moment, 1]
    assert warm_cli("run", toy_config(tmp_path, SELM), log=tmp_path / "log", kill=kill).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    answered = generated(tmp_path / "log")
    assert answered.keys() == generated(greedy / "log").keys()
    assert sum(answered.values()) - len(answered) == (moment == "in its middle")
    assert everything(tmp_path / "runs/toy") == everything(greedy / "runs/toy")
    assert rollouts(tmp_path / "runs/toy", 2) == rollouts(greedy / "runs/toy", 2)


def test_the_samples_page_says_which_response_is_the_greedy_one(greedy, cli):
    shown = cli("show", greedy / "runs/toy", "--samples", "--iteration", "1")
    assert shown.returncode == 0, shown.message
    assert "greedy" in shown.stdout


def test_one_sample_and_the_greedy_response_are_a_pair(toy_config, warm_cli, tmp_path):
    config = toy_config(tmp_path, SELM, iterations=1)
    done = warm_cli("run", config, "sampling.samples_per_prompt=1", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        assert run.phases(1)["train"]["items"] > 0


def test_another_reference_must_be_meant(toy_config, warm_cli, tmp_path):
    done = warm_cli("check", toy_config(tmp_path, SELM), "reference.schedule=fixed")
    assert done.returncode != 0
    assert "selm is defined against the previous iterate" in done.message


def test_a_pair_whose_exploration_response_was_cut_is_no_trained_pair(toy_config, warm_cli, tmp_path):
    """The greedy response of the base model never ends."""
    config = toy_config(tmp_path, SELM, iterations=1)
    done = warm_cli("run", config, "training.on_truncated=drop", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        record = run.phases(1)["train"]
        assert run.read(1, "pairs") == []
    assert {*rollouts(tmp_path / "runs/toy", 1)[0]["finish_reasons"][K:]} == {"length"}
    assert (record["items"], record["dropped"]["truncated"] > 0) == (0, True)
