"""What a loss keeps from one optimizer step to the next goes on over a kill and a resume, on the toy engine and learner."""

from __future__ import annotations

import json
import signal

import pytest
from toy_runs import everything

from onlinerl import registry
from onlinerl.ops.batching import annotator_number
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.trackers.jsonl import read_metrics

ALGORITHMS = {
    "bco": ({"algorithm.baseline_decay": 0.5}, {"baseline", "steps"}),
    "re_po": ({"algorithm.eta_rate": 0.5}, {f"eta_{annotator_number('vader'):012x}"}),
}
"""By name, how they are set, and what they keep."""
INSIDE = ["before 2 train", 1]
"""The steps of iteration 2, which need what iteration 1 has left, are taken and not recorded: a resume takes them again."""


@pytest.fixture(scope="module", params=ALGORITHMS)
def algorithm(request):
    """Its overrides."""
    return {"algorithm.name": request.param, **ALGORITHMS[request.param][0]}


@pytest.fixture(scope="module")
def straight(algorithm, toy_config, warm_cli_in, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = warm_cli_in(folder)("run", toy_config(folder, algorithm))
    assert done.returncode == 0, done.message
    return folder / "runs/toy"


def killed_and_resumed(warm_cli, config, tmp_path, **spec):
    """What such a run reports."""
    run, log = tmp_path / "runs/toy", tmp_path / "log"
    assert warm_cli("run", config, log=log, kill=INSIDE, **spec).returncode == -signal.SIGKILL
    done = warm_cli("resume", run, log=log, **spec)
    assert done.returncode == 0, done.message
    return everything(run)


def test_a_resume_goes_on_with_the_same_state(algorithm, straight, toy_config, warm_cli, tmp_path):
    """The same weights to the last bit, and the same figures."""
    assert killed_and_resumed(warm_cli, toy_config(tmp_path, algorithm), tmp_path) == everything(straight)
    last = [json.loads((run / "checkpoints/0003/algorithm.json").read_text()) for run in (straight, tmp_path / "runs/toy")]
    assert last[0] == last[1]
    assert set(last[0]) == ALGORITHMS[algorithm["algorithm.name"]][1]


def test_a_state_that_is_not_saved_would_be_noticed(algorithm, straight, toy_config, warm_cli, tmp_path):
    """The fault that the test above is there for."""
    resumed = killed_and_resumed(warm_cli, toy_config(tmp_path, algorithm), tmp_path, broken="state")
    assert resumed["weights"][0] == everything(straight)["weights"][0]
    assert resumed["weights"][1] != everything(straight)["weights"][1]


def test_the_state_is_reported(algorithm, straight):
    declared = {m.name for m in registry.load("algorithms", algorithm["algorithm.name"], Algorithm)().metrics}
    recorded = {m["name"] for m in read_metrics(straight / "metrics.jsonl") if m["iteration"] == 3}
    assert declared & recorded
