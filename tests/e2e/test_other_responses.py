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
XPO = {**COUNTED, "algorithm.name": "xpo", "iterations": ITERATIONS, "sampling.samples_per_prompt": 1}
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


# --- the last pair of a prompt that comes again ---


CARRIED = {**SELM, "algorithm.carry_over": True, "prompts.reuse": True, "prompts.per_iteration": 20, "iterations": 4}
"""40 prompts, so each comes in two iterations."""


@pytest.fixture(scope="module")
def carried(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run that takes pairs over, and that nothing happened to."""
    folder = tmp_path_factory.mktemp("carried")
    done = warm_cli_in(folder)("run", toy_config(folder, CARRIED), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "(4 samples + 1 greedy response + 2 carried responses)" in done.stdout
    return folder


def test_the_pair_that_was_trained_of_a_prompt_joins_its_next_group(carried):
    """Chosen and rejected, as they were sampled then; they are judged with the others, and are no samples of the iteration."""
    run = carried / "runs/toy"
    trained: dict[str, list] = {}
    seen = found = again = 0
    for t in range(1, 5):
        with RunDirectory.open(run) as opened:
            pairs = {row["prompt_id"]: row for row in opened.read(t, "pairs")}
            record = opened.phases(t)
        for row in rollouts(run, t):
            before = trained.get(row["prompt_id"])
            assert row["sources"] == ["policy"] * K + ["greedy"] + ["carried"] * (2 if before else 0)
            if before:
                seen += 1
                columns = ("token_ids", "logprobs", "texts", "seeds", "policy_versions")
                assert [[row[name][K + 1 + n] for name in columns] for n in (0, 1)] == before
                assert all(version < t - 1 for version in row["policy_versions"][K + 1 :])
            if pair := pairs.get(row["prompt_id"]):
                again += pair["chosen"] > K
                both = (pair["chosen"], pair["rejected"])
                trained[row["prompt_id"]] = [
                    [row[name][k] for name in ("token_ids", "logprobs", "texts", "seeds", "policy_versions")] for k in both
                ]
            found += 1
        assert record["sample"]["samples"] == 20 * (K + 1)
        assert record["train"]["sampled_by"] == [t - 1]
    assert (found, seen > 20, again > 0) == (80, True, True)


def test_killed_while_it_samples_a_run_takes_the_same_pairs_over(carried, toy_config, warm_cli_in, tmp_path):
    cli = warm_cli_in(tmp_path)
    killed = cli(
        "run", toy_config(tmp_path, CARRIED), log=tmp_path / "log", kill=["generate", HELDOUT + 2 * (20 + HELDOUT) + 5]
    )
    assert killed.returncode == KILLED, "in the third iteration, the first in which prompts come again"
    done = cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    assert everything(tmp_path / "runs/toy", 4) == everything(carried / "runs/toy", 4)
    assert rollouts(tmp_path / "runs/toy", 3) == rollouts(carried / "runs/toy", 3)


# --- responses of the base model ---


@pytest.fixture(scope="module")
def explored(toy_config, warm_cli_in, tmp_path_factory):
    """A folder with a run of xpo that nothing happened to."""
    folder = tmp_path_factory.mktemp("explored")
    done = warm_cli_in(folder)("run", toy_config(folder, XPO), log=folder / "log")
    assert done.returncode == 0, done.message
    assert "8 prompts x (1 sample + 1 reference response) -> at most 8 pairs" in done.stdout
    return folder


def pushed(log: Path) -> list[int]:
    return [e["version"] for e in events(log) if e["kind"] == "push"]


def test_each_pair_is_one_response_of_the_policy_and_one_of_the_base_model(explored):
    run = explored / "runs/toy"
    base = np.log(np.full(len(weights(run, 1)), 1 / len(weights(run, 1))))
    for t in range(1, ITERATIONS + 1):
        for row in rollouts(run, t):
            assert row["sources"] == ["policy", "reference"]
            assert row["policy_versions"] == [t - 1, 0]
            own, other = row["logprobs"]
            logits = weights(run, t - 1) if t > 1 else base
            policy = logits - np.log(np.exp(logits).sum())
            assert own == pytest.approx(policy[row["token_ids"][0]].tolist(), abs=1e-5)
            assert other == pytest.approx(base[row["token_ids"][1]].tolist(), abs=1e-5), "sampled from the base model"
    with RunDirectory.open(run) as opened:
        records = [opened.phases(t) for t in range(1, ITERATIONS + 1)]
    assert [[*record][:2] for record in records] == [["sample_reference", "sample"]] * ITERATIONS
    assert [record["sample_reference"]["pushes"] for record in records] == [0, 2, 2], "at first the policy is the base model"
    assert [record["train"]["sampled_by"] for record in records] == [[0], [1], [2]], "that of the base model is not stale"
    assert pushed(explored / "log") == [0, 1, 0, 1, 2, 0, 2, 3]
    assert all(row["sync"]["proved"] for row in summarise(run)["iterations"])


def test_the_base_model_is_asked_once_about_each_prompt(explored):
    answered = generated(explored / "log")
    assert {*answered.values()} == {1}
    assert len(answered) == 2 * ITERATIONS * PROMPTS + (ITERATIONS + 1) * HELDOUT
    asked = [one for e in events(explored / "log") if e["kind"] == "judge" for one in e["asked"]]
    assert sum(len(one) == 3 for one in asked) == ITERATIONS * PROMPTS + 1, "both are judged together, and the trial question"


FIRST = HELDOUT + 2 * PROMPTS + HELDOUT
"""Groups that are sampled before iteration 2."""
MOMENTS = {
    "before the base model is pushed": ["after 1 commit", 1],
    "when the base model has been pushed": ["push", 3],
    "while the base model is sampled": ["generate", FIRST + 3],
    "when the base model has been sampled": ["generate", FIRST + PROMPTS],
    "when the policy has been pushed back": ["push", 4],
    "before that is recorded": ["before 2 sample_reference", 1],
    "when that is recorded": ["after 2 sample_reference", 1],
    "while the policy is sampled": ["generate", FIRST + PROMPTS + 3],
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("schedule", [[], ["schedule.stream=true", "schedule.evaluate_beside=true"]], ids=["in turn", "beside"])
def test_killed_while_the_engine_holds_the_base_model(explored, toy_config, warm_cli, tmp_path, moment, schedule):
    """Whatever the engine held, no prompt is answered by the wrong weights, and none is asked twice but the one in the works."""
    command = ("run", toy_config(tmp_path, XPO), *schedule)
    assert warm_cli(*command, log=tmp_path / "log", kill=MOMENTS[moment]).returncode == KILLED
    done = warm_cli("resume", "runs/toy", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    answered = generated(tmp_path / "log")
    assert answered.keys() == generated(explored / "log").keys()
    assert sum(answered.values()) - len(answered) <= 2
    ours, theirs = everything(tmp_path / "runs/toy"), everything(explored / "runs/toy")
    assert [ours[key] for key in ("weights", "pairs", "metrics")] == [theirs[key] for key in ("weights", "pairs", "metrics")]
    assert [rollouts(tmp_path / "runs/toy", t) for t in (1, 2, 3)] == [rollouts(explored / "runs/toy", t) for t in (1, 2, 3)]


def test_of_several_samples_pairs_with_the_base_model_are_kept(toy_config, warm_cli, tmp_path):
    config = toy_config(tmp_path, XPO, iterations=1)
    done = warm_cli("run", config, "sampling.samples_per_prompt=3", log=tmp_path / "log")
    assert done.returncode == 0, done.message
    with RunDirectory.open(tmp_path / "runs/toy") as run:
        record = run.phases(1)["train"]
    assert record["items"] > 0
    assert record["dropped"]["same_source"] > 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["schedule.max_lag=1", "schedule.evaluate_beside=true"], "schedule.max_lag: is 1, and xpo samples the base model too"),
        (["cluster.colocate=true"], "cluster.colocate"),
    ],
)
def test_where_the_learner_cannot_lend_the_base_model_it_is_refused(toy_config, warm_cli, tmp_path, overrides, said):
    done = warm_cli("check", toy_config(tmp_path, XPO), *overrides)
    assert done.returncode != 0
    assert said in done.message


def test_raft_trains_a_share_of_stored_answers(toy_config, onlinerl, tmp_path):
    """Of 8 prompts one response each, and 2 answers: a quarter of the former, so that they are a fifth of what is trained."""
    keys = {"algorithm.name": "raft", "algorithm.real_data_frac": 0.2, "iterations": 2, "metrics.prometheus": False}
    code, message = onlinerl("run", toy_config(tmp_path / "without", keys))
    assert code == 2
    assert "have no reference answer" in message
    code, message = onlinerl("run", toy_config(tmp_path, keys, answer="good great wonderful"))
    assert code == 0, message
    with RunDirectory.open(tmp_path / "runs/toy") as opened:
        for t in (1, 2):
            record = opened.phases(t)["train"]
            assert record["items"] == 10
            assert record["dropped"]["real_data"] == 6
            assert record["figures"] == {"real_data": pytest.approx(0.2)}
