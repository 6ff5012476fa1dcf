"""`reference.schedule: ema` on the toy engine and learner: which weights the reference is, and that a kill changes nothing about it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from toy_runs import COUNTED, HELDOUT, PROMPTS, everything, weights

from onlinerl.graph import NAMES as PHASES
from onlinerl.learners.toy import ToyLearner
from onlinerl.stores.directory import RunDirectory

EMA = {"reference.schedule": "ema", "reference.mixup_alpha": 0.3, "iterations": 4}
ALL = {**EMA, "checkpoints.keep": 9}
KILLED = -signal.SIGKILL


def reference(run: Path, iteration: int) -> np.ndarray:
    """The average that iteration `iteration` has left; 0 is the base model."""
    return np.load(run / f"references/{iteration:04d}/logits.npy") if iteration else np.zeros_like(weights(run, 1))


def kept(run: Path, kind: str) -> set[int]:
    return {int(path.name) for path in (run / kind).glob("[0-9]*")}


def is_the_average(run: Path, every: int = 1) -> bool:
    pairs = [
        (reference(run, t), 0.7 * reference(run, t - every) + 0.3 * weights(run, t)) for t in range(1, 5) if t % every == 0
    ]
    return all(np.allclose(found, expected, rtol=1e-12, atol=1e-12) for found, expected in pairs)


def log_probs(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize(("every", "used"), [(1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (3, [0, 0, 0, 3])])
def test_the_reference_is_the_average_of_what_it_has_taken_in(toy_config, warm_cli, tmp_path, every, used):
    done = warm_cli("run", toy_config(tmp_path, {**ALL, "reference.every": every}))
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    assert kept(run, "references") == {t for t in range(1, 5) if t % every == 0}
    assert is_the_average(run, every)
    with RunDirectory.open(run) as opened:
        for t, newest in enumerate(used, start=1):
            assert opened.phases(t)["train"]["reference"] == opened.phases(t)["annotate"]["reference"] == newest
            tokens = {row["prompt_id"]: row["token_ids"] for row in opened.read(t, "rollouts")}
            rows = opened.read(t, "logprobs")
            assert rows
            sampled = log_probs(weights(run, t - 1) if t > 1 else reference(run, 0))
            for row in rows:
                for array in row["reference_logprobs"]:
                    said = [log_probs(reference(run, newest))[list(ids)] for ids in tokens[row["prompt_id"]]]
                    assert any(len(s) == len(array) and np.allclose(s, array, atol=1e-6) for s in said)
                    if newest:  # neither the policy nor what it began with
                        theirs = [sampled[list(ids)] for ids in tokens[row["prompt_id"]]]
                        assert not any(len(s) == len(array) and np.allclose(s, array, atol=1e-4) for s in theirs)
        measured = opened.phases(4)["measure"]
    assert measured["kl_ref"] != measured["kl_prev"], "KL to the base model and to the iterate before are both there"


def test_a_weight_of_one_is_a_copy(toy_config, warm_cli, tmp_path):
    """To the last bit the same run as with `previous`."""
    seen = []
    for name, keys in (("copy", {"reference.schedule": "ema", "reference.mixup_alpha": 1.0}), ("previous", {})):
        keys = keys or {"reference.schedule": "previous"}
        done = warm_cli("run", toy_config(tmp_path, keys, name=name, file=f"{name}.yaml"))
        assert done.returncode == 0, done.message
        run = tmp_path / "runs" / name
        found = everything(run)
        found["figures"].pop("run")
        seen.append((found, reference_logprobs(run)))
    assert seen[0] == seen[1]


def reference_logprobs(run: Path) -> list[list]:
    with RunDirectory.open(run) as opened:
        return [row["reference_logprobs"] for t in (1, 2, 3) for row in opened.read(t, "logprobs")]


@pytest.mark.parametrize(
    ("keys", "references"),
    [
        ({}, {3, 4}),
        ({"checkpoints.keep": 1}, {4}),
        ({"checkpoints.keep": 3}, {2, 3, 4}),
        ({"reference.every": 3}, {3}),
        ({"reference.every": 2, "checkpoints.exports": "last"}, {2, 4}),
        ({"schedule.max_lag": 1, "schedule.stream": True, "schedule.evaluate_beside": True}, {3, 4}),
    ],
    ids=str,
)
def test_whoever_goes_on_from_a_checkpoint_finds_its_reference(toy_config, warm_cli, tmp_path, keys, references):
    """And what no checkpoint that is kept leads to is removed."""
    config = toy_config(tmp_path, {**EMA, **keys})
    done = warm_cli("run", config)
    assert done.returncode == 0, done.message
    run = tmp_path / "runs/toy"
    assert kept(run, "references") == references
    assert kept(run, "exports") == ({3, 4} if "checkpoints.exports" in keys else {1, 2, 3, 4}), "an average needs none of them"
    expected, last = everything(run, 0), weights(run, 4)
    oldest = min(kept(run, "checkpoints"))
    if "schedule.max_lag" in keys:  # what was sampled from an older version than any checkpoint cannot be sampled again
        return
    for kind in ("iterations", "checkpoints", "exports", "references"):
        for path in (run / kind).glob("[0-9]*"):
            if int(path.name) > oldest:
                shutil.rmtree(path)
    done = warm_cli("resume", run, "--finished-ok")
    assert done.returncode == 0, done.message
    assert np.array_equal(weights(run, 4), last)
    assert everything(run, 0)["figures"] == expected["figures"]


def test_a_loss_beside_the_reference_gets_the_average(toy_config, onlinerl, monkeypatch, tmp_path):
    named: list[str] = []

    def set_reference(self, model, original=ToyLearner.set_reference):
        named.append(model)
        original(self, model)

    monkeypatch.setattr(ToyLearner, "set_reference", set_reference)
    code, message = onlinerl("run", toy_config(tmp_path, {**EMA, "algorithm.name": "tdpo2", "metrics.prometheus": False}))
    assert code == 0, message
    assert ["/".join(path.split("/")[-2:]) for path in named[1:]] == [f"references/000{t}" for t in (1, 2, 3)]


# --- killed and resumed ---

EVALUATION_CALLS, LABEL_CALLS = 3, 2
INSIDE = {
    "sample": ["generate", HELDOUT + PROMPTS + HELDOUT + 3],
    "label": ["judge", 1 + EVALUATION_CALLS + LABEL_CALLS + EVALUATION_CALLS + 2],
    "annotate": ["logprobs", 6],
    "train": ["step", 3],
    "checkpoint": ["save", 2],  # the new reference is there, the checkpoint is not
    "sync": ["push", 3],
    "answer": ["generate", HELDOUT + 2 * (PROMPTS + HELDOUT) - 5],
    "measure": ["judge", 1 + 2 * (EVALUATION_CALLS + LABEL_CALLS) + 2],
    "commit": ["retain", 4],  # the checkpoints of iteration 2 are sorted out, its references are not
}
RUN = {**COUNTED, **EMA, "iterations": 3}


def all_of(run: Path) -> dict:
    return everything(run) | {"references": {t: reference(run, t).tolist() for t in kept(run, "references")}}


@pytest.fixture(scope="module")
def uninterrupted(toy_config, warm_cli_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = warm_cli_in(folder)("run", toy_config(folder, RUN), log=folder / "log")
    assert done.returncode == 0, done.message
    return all_of(folder / "runs/toy")


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_every_phase(toy_config, warm_cli, uninterrupted, tmp_path, phase):
    config, run, log = toy_config(tmp_path, RUN), tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", config, log=log, kill=INSIDE[phase]).returncode == KILLED
    assert warm_cli("resume", run, log=log, kill=[f"before 2 {phase}", 1]).returncode in (0, KILLED)
    assert warm_cli("resume", run, log=log, kill=[f"after 3 {phase}", 1]).returncode in (0, KILLED)
    warm_cli("resume", run, "--finished-ok", log=log)
    assert all_of(run) == uninterrupted
    assert uninterrupted["references"].keys() == {2, 3}


LAG = {"schedule.max_lag": 1, "schedule.stream": True, "schedule.evaluate_beside": True}


@pytest.fixture(scope="module")
def lagged(toy_config, warm_cli_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lagged")
    done = warm_cli_in(folder)("run", toy_config(folder, {**RUN, **LAG}), log=folder / "log")
    assert done.returncode == 0, done.message
    return learned(folder / "runs/toy")


def learned(run: Path) -> list[list[float]]:
    return [
        *(weights(run, t).tolist() for t in (1, 2, 3)),
        *(reference(run, t).tolist() for t in sorted(kept(run, "references"))),
    ]


@pytest.mark.parametrize("phase", ["annotate", "train", "checkpoint", "commit"])
def test_killed_while_the_next_iteration_is_sampled(toy_config, warm_cli, lagged, tmp_path, phase):
    """The log-probs of an iteration need the average as soon as there is one, while the iterate before is still measured."""
    config, run, log = toy_config(tmp_path, {**RUN, **LAG}), tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", config, log=log, kill=[f"before 2 {phase}", 1]).returncode == KILLED
    done = warm_cli("resume", run, log=log)
    assert done.returncode == 0, done.message
    assert learned(run) == lagged
    assert len(lagged) == 5


def test_an_average_that_forgets_would_be_noticed(toy_config, onlinerl, monkeypatch, tmp_path):
    """It starts from the base model again at each update."""

    def average(self, reference, weight, path, original=ToyLearner.average):
        original(self, self._base, weight, path)

    monkeypatch.setattr(ToyLearner, "average", average)
    assert onlinerl("run", toy_config(tmp_path, {**ALL, "metrics.prometheus": False}))[0] == 0
    assert not is_the_average(tmp_path / "runs/toy")


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_reference_that_is_not_whole_stops_the_run_and_the_way_back_is_named(toy_config, warm_cli, tmp_path, fault):
    config, run, log = toy_config(tmp_path, RUN), tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", config, log=log, kill=["before 3 sample", 1]).returncode == KILLED
    file = run / "references/0002/logits.npy"
    if fault == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    stopped = warm_cli("resume", run, log=log)
    assert stopped.returncode == 1, stopped.message
    assert "references/0002/logits.npy" in stopped.stderr
    assert "go back to iteration 1, which is whole" in stopped.stderr
    assert "references/0002" in stopped.stderr.split("rm -r", 1)[1]
