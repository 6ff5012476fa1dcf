"""Two passes over the items of an iteration, with auxiliary weights that have a training run of their own; on the toy engine and learner."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import COUNTED, everything, weights

from onlinerl.controller.iteration import Iteration
from onlinerl.graph import NAMES as PHASES
from onlinerl.learners.toy import ToyLearner
from onlinerl.stores.directory import RunDirectory

FAILED, REFUSED, KILLED = 1, 2, -signal.SIGKILL
ONPO = COUNTED | {"algorithm.name": "onpo", "metrics.prometheus": False}
KINDS = ("auxiliary", "checkpoints")
INSIDE = {
    "the first pass": ["step", 5],
    "the auxiliary weights being written": ["save", 3],
    "the second pass": ["step", 7],
    "the checkpoint being written": ["save", 4],
}
"""Of iteration 2, with two steps a pass."""


def auxiliary(run: Path, iteration: int) -> np.ndarray:
    """The auxiliary weights that an iteration has made."""
    return torch.load(run / f"auxiliary/{iteration:04d}/toy.pt", weights_only=True)["logits"].numpy()


def of_run(run: Path, iterations: int = 3) -> dict:
    return everything(run, iterations) | {"auxiliary": [auxiliary(run, t).tolist() for t in kept(run)]}


def kept(run: Path, kind: str = "auxiliary") -> list[int]:
    return sorted(int(path.name) for path in (run / kind).glob("[0-9]*"))


@pytest.fixture(scope="module")
def straight(toy_config, warm_cli_in, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = warm_cli_in(folder)("run", toy_config(folder, ONPO), log=folder / "log")
    assert done.returncode == 0, done.message
    return folder / "runs/toy"


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_each_pass_is_against_what_it_starts_from_and_over_the_same_items(toy_config, onlinerl, monkeypatch, tmp_path, state):
    """The first one goes on from the auxiliary weights of the iteration before, with their optimizer, and the second one from it."""
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    items: list[list] = []
    resets: list[int] = []

    def update(self, steps, rates, original=ToyLearner.update):
        trained = [item for step in steps for item in step]
        for sequence in (s for item in trained for s in item.sequences):
            (said,) = self.logprobs([sequence])
            assert np.array_equal(sequence.reference_logprobs, said)
        items.append(sorted((item.prompt_id, *(tuple(s.response_ids) for s in item.sequences)) for item in trained))
        starts.append(self.logits.detach().numpy().copy())
        yield from original(self, steps, rates)
        ends.append(self.logits.detach().numpy().copy())

    def reset(self, original=ToyLearner.reset_optimizer):
        resets.append(len(ends))
        original(self)

    monkeypatch.setattr(ToyLearner, "update", update)
    monkeypatch.setattr(ToyLearner, "reset_optimizer", reset)
    overrides = {"algorithm.name": "onpo", "metrics.prometheus": False, "training.optimizer_state": state}
    code, message = onlinerl("run", toy_config(tmp_path, overrides))
    assert code == 0, message
    run = tmp_path / "runs/toy"
    assert len(starts) == 6
    assert not starts[0].any()
    first, second = slice(0, None, 2), slice(1, None, 2)
    assert np.array_equal(starts[second], ends[first])
    assert np.array_equal(starts[first][1:], ends[first][:-1])
    assert items[first] == items[second]
    assert np.array_equal(ends[second], [weights(run, t) for t in (1, 2, 3)])
    assert not np.array_equal(starts[2], ends[1]), "the second iteration would have begun at the policy"
    for t in kept(run):
        assert np.array_equal(auxiliary(run, t), ends[2 * (t - 1)])
    steps = [torch.load(run / f"{kind}/0003/toy.pt", weights_only=True)["optimizer"]["state"][0]["step"] for kind in KINDS]
    # Two steps a pass: three passes made the auxiliary weights, and one more the policy.
    assert [int(step) for step in steps] == ([6, 8] if state == "keep" else [2, 2])
    assert resets == ([] if state == "keep" else [1, 2, 3, 4, 5])


def test_both_passes_are_reported_as_steps_of_one_iteration(straight):
    with RunDirectory.open(straight) as run:
        for t in (1, 2, 3):
            record = run.phases(t)["train"]
            assert (record["steps"], record["reference"]) == (4, None)
            assert all(row["reference_logprobs"] is None for row in run.read(t, "logprobs"))


@pytest.mark.parametrize("moment", [*INSIDE, *(f"{side} {phase}" for phase in PHASES for side in ("before", "after"))])
def test_killed_and_resumed_it_is_the_same_run(straight, toy_config, warm_cli, tmp_path, moment):
    side, _, phase = moment.partition(" ")
    kill = INSIDE.get(moment) or [f"{side} 2 {phase}", 1]
    run, log = tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", toy_config(tmp_path, ONPO), log=log, kill=kill).returncode == KILLED
    if moment in INSIDE:
        with RunDirectory.open(run) as opened:
            assert opened.phases(2).keys() == {*PHASES[: PHASES.index("train") + (moment == [*INSIDE][-1])]}
            assert kept(run) == ([1] if moment in [*INSIDE][:2] else [1, 2])
    done = warm_cli("resume", run, log=log)
    assert done.returncode == 0, done.message
    assert of_run(run) == of_run(straight)


def test_a_resume_that_began_at_the_policy_would_be_noticed(straight, toy_config, onlinerl, warm_cli, monkeypatch, tmp_path):
    """The fault that the tests above are there for."""
    run = tmp_path / "runs/toy"
    killed = warm_cli("run", toy_config(tmp_path, ONPO), log=tmp_path / "log", kill=["before 2 train", 1])
    assert killed.returncode == KILLED
    load = ToyLearner.load
    monkeypatch.setattr(ToyLearner, "load", lambda self, path: None if "auxiliary" in str(path) else load(self, path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))
    import hooks

    monkeypatch.setitem(hooks.SPEC, "log", str(tmp_path / "log"))
    code, message = onlinerl("resume", run)
    assert code == 0, message
    assert np.array_equal(weights(run, 1), weights(straight, 1))
    assert not np.array_equal(weights(run, 2), weights(straight, 2))


@pytest.mark.parametrize("keep", [1, 2])
def test_those_that_the_kept_checkpoints_go_on_from_are_kept_over_an_iteration_without_steps(
    straight, toy_config, warm_cli, tmp_path, keep
):
    """An iteration that gives nothing to learn leaves the auxiliary weights as they are, and a run that is resumed after it finds them."""
    with RunDirectory.open(straight) as opened:
        tied = [row["prompt"] for row in opened.read(2, "rollouts")]
    config, run = toy_config(tmp_path, ONPO | {"checkpoints.keep": keep}), tmp_path / "runs/toy"
    assert warm_cli("run", config, log=tmp_path / "log", tied=tied, kill=["after 2 commit", 1]).returncode == KILLED
    assert (kept(run, "checkpoints"), kept(run)) == ([2] if keep == 1 else [1, 2], [1])
    assert np.array_equal(weights(run, 2), weights(run, 1))
    done = warm_cli("resume", run, log=tmp_path / "log", tied=tied)
    assert done.returncode == 0, done.message
    assert (kept(run, "checkpoints"), kept(run)) == (([3], [3]) if keep == 1 else ([2, 3], [1, 3]))
    with RunDirectory.open(run) as opened:
        assert [opened.phases(t)["train"]["steps"] for t in (1, 2, 3)] == [4, 0, 4]
    assert kept(straight) == kept(straight, "checkpoints") == [2, 3]


def test_auxiliary_weights_that_are_damaged_are_refused_with_the_way_back(straight, toy_config, warm_cli, tmp_path):
    run, log = tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", toy_config(tmp_path, ONPO), log=log, kill=["before 3 train", 1]).returncode == KILLED
    file = run / "auxiliary/0002/toy.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = warm_cli("resume", run, log=log)
    assert done.returncode == FAILED, done.message
    assert "auxiliary/0002/toy.pt" in done.stderr
    assert "go back to iteration 1," in " ".join(done.stderr.split())
    for path in ("iterations/0002", "iterations/0003", "checkpoints/0002", "auxiliary/0002", "auxiliary/0003", "exports/0002"):
        assert path in done.stderr
        shutil.rmtree(run / path)
    done = warm_cli("resume", run, log=log)
    assert done.returncode == 0, done.message
    assert of_run(run) == of_run(straight)


def test_one_pass_has_no_auxiliary_weights(toy_config, warm_cli, tmp_path):
    done = warm_cli("run", toy_config(tmp_path, ONPO | {"algorithm.optimistic": False}), log=tmp_path / "log")
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    assert not (run / "auxiliary").exists()
    with RunDirectory.open(run) as opened:
        assert [(record["steps"], record["reference"]) for record in (opened.phases(t)["train"] for t in (1, 2, 3))] == [
            (2, 0),
            (2, 1),
            (2, 2),
        ]


def test_which_iteration_has_trained_last():
    """One that took no step has no auxiliary weights of its own."""

    class Recorded(Iteration):
        def __init__(self) -> None:
            self.number = 5

        def _train_record(self, number):
            return {1: {"steps": 2}, 2: {"steps": 0}, 3: {"steps": 4}}.get(number)

    assert [Recorded().last_trained(until) for until in (-1, 0, 1, 2, 3, 4)] == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("override", "field", "said"),
    [
        ("schedule.max_lag=1", "schedule.max_lag", "a game of the newest policy"),
        ("reference.schedule=fixed", "reference.schedule", "nothing would read it"),
    ],
)
def test_what_makes_no_sense_with_two_passes_is_refused(toy_config, onlinerl, tmp_path, override, field, said):
    config = toy_config(tmp_path, {"algorithm.name": "onpo", "schedule.stream": True})
    code, message = onlinerl("check", config, override)
    assert code == REFUSED
    assert field in message
    assert said in message
    code, message = onlinerl("check", config)
    assert code == 0, message
