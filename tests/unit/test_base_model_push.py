"""The engine gets the base model while the learner keeps the policy: the real controller, pool and push, with replicas that die meanwhile."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from onlinerl import app
from onlinerl import config as configuration
from onlinerl.errors import LearnerError
from onlinerl.learners._weights import PolicySource, Switched
from onlinerl.stores.directory import RunDirectory

pytest.importorskip("ray")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import toy_fleet
from toy_fleet import Replica, World

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, toy_config: Any, tmp_path: Path) -> Run:
    """Two iterations of xpo on three replicas; returns what was sampled, and what the console said."""

    def start(world: World, folder: str, **more: Any) -> dict[str, Any]:
        toy_fleet.install(monkeypatch, world)
        keys = {
            "algorithm.name": "xpo",
            "iterations": 2,
            "engine.name": "vllm",
            "learner.name": "deepspeed",
            "engine.replicas": 3,
            "engine.max_num_seqs": 4,
            "sampling.samples_per_prompt": 2,
            "pairing.name": "all_pairs",
            "cluster.device": "cpu",
            "metrics.prometheus": False,
            **more,
        }
        out = io.StringIO()
        app.run(configuration.load(toy_config(tmp_path / folder, keys)), Console(file=out, width=400))
        with RunDirectory.open(tmp_path / folder / "runs/toy") as store:
            rows = {t: sorted(store.read(t, "rollouts"), key=lambda row: row["prompt_id"]) for t in (1, 2)}
            records = {t: store.phases(t)["sample_reference"] for t in (1, 2)}
        weights = json.loads((tmp_path / folder / "runs/toy/exports/0001/weights.json").read_text())
        return {"rows": rows, "weights": weights, "pushes": [records[t]["pushes"] for t in (1, 2)], "said": out.getvalue()}

    return start


def assert_sampled_by_both(done: dict[str, Any]) -> None:
    """The fake replica's log-probs say which weights it had."""
    assert done["weights"] > 0
    assert done["pushes"] == [0, 2]
    for t, weights in ((1, 0.0), (2, done["weights"])):
        assert len(done["rows"][t]) == 8
        for row in done["rows"][t]:
            assert (row["sources"], row["policy_versions"]) == (["policy", "policy", "reference"], [t - 1, t - 1, 0])
            expected = [-1.0 - weights, -1.0 - weights, -1.0]
            assert [own[0] for own in row["logprobs"]] == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize("backend", ["auto", "disk"])
def test_the_base_model_is_sampled_and_the_policy_pushed_back(run: Run, backend: str) -> None:
    assert_sampled_by_both(run(World(), "a", **{"sync.backend": backend}))


PUSHES = {"to the base model": 3, "back to the policy": 4}
"""Which push of a run of two iterations."""


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("fault", [("update_weights", "kill"), ("received", "other digests"), ("logprobs", "other weights")])
def test_a_replica_that_fails_in_one_of_the_pushes_is_replaced(run: Run, push: str, fault: tuple[str, str]) -> None:
    method, what = fault
    done = run(World({(1, method, PUSHES[push]): what}), "a")
    assert done["said"].count("is given up") == 1
    assert_sampled_by_both(done)


def test_a_replica_that_dies_with_the_base_model_comes_back_with_it(run: Run, tmp_path: Path) -> None:
    """While the base model answers in iteration 2; it is given version 0 from disk, and the policy with all the others."""
    world, struck = World(), list[Replica]()

    def before(actor: Replica, method: str) -> None:
        later = (tmp_path / "a/runs/toy/exports/0001/weights.json").exists()
        if later and method == "answer" and actor.version == "0" and not struck:
            struck.append(actor)
            actor.die()

    world.before = before
    done = run(world, "a")
    assert len(struck) == 1
    assert done["said"].count("is given up (died)") == 1
    assert_sampled_by_both(done)


# --- what the learner sends ---


def network(width: int, value: float) -> nn.Module:
    made = nn.Linear(width, 2)
    nn.init.constant_(made.weight, value)
    return made


def test_a_source_is_another_model_for_a_while() -> None:
    policy, base = (PolicySource(network(3, value), torch.bfloat16) for value in (1.0, 2.0))
    source = Switched(policy)
    with source.to(base):
        assert {float(tensor.max()) for name, tensor in source if name == "weight"} == {2.0}
        assert source.metadata() == policy.metadata()
    assert {float(tensor.max()) for name, tensor in source if name == "weight"} == {1.0}


def test_a_model_with_other_tensors_is_refused() -> None:
    source = Switched(PolicySource(network(3, 1.0), torch.float32))
    with (
        pytest.raises(LearnerError, match="other tensors than the policy"),
        source.to(PolicySource(network(4, 1.0), torch.float32)),
    ):
        pass
