"""Items that an algorithm orders into stages, on the toy engine and learner."""

from __future__ import annotations

import numpy as np
import pytest
from toy_runs import weights

from onlinerl.algorithms.dpo import Dpo
from onlinerl.controller.phases.train import _stages
from onlinerl.errors import LearnerError
from onlinerl.learners.toy import ToyLearner

FIXED = {"reference.schedule": "fixed", "reference.allow_nonstandard": True, "iterations": 2}


@pytest.fixture
def learned(toy_config, warm_cli, tmp_path):
    """The weights at the end of a run."""

    def run(name: str, knobs: dict[str, object]) -> np.ndarray:
        done = warm_cli("run", toy_config(tmp_path, knobs, name=name, file=f"{name}.yaml"))
        assert done.returncode == 0, done.message
        return weights(tmp_path / "runs" / name, 2)

    return run


def test_with_two_responses_a_curriculum_is_dpo(learned):
    two = {"sampling.samples_per_prompt": 2}
    curry = learned("curry", FIXED | two | {"algorithm.name": "curry_dpo", "algorithm.stages": 1})
    assert np.array_equal(curry, learned("dpo", two | {"iterations": 2}))


def test_one_stage_is_dpo_on_the_same_pairs_and_more_stages_are_not(learned):
    curry = FIXED | {"algorithm.name": "curry_dpo", "algorithm.stage_reference": "iteration"}
    plain = learned("dpo", {"pairing.name": "best_rest", "iterations": 2})
    assert np.array_equal(learned("one", curry | {"algorithm.stages": 1}), plain)
    assert not np.array_equal(learned("more", curry), plain)


@pytest.mark.parametrize(
    ("knobs", "moves", "resets"),
    [
        ({}, True, 0),
        ({"algorithm.stage_optimizer_state": "reset"}, True, 4),
        ({"algorithm.stage_reference": "iteration"}, False, 0),
    ],
)
def test_the_reference_of_a_stage_is_the_policy_that_the_one_before_ended_with(
    toy_config, onlinerl, monkeypatch, tmp_path, knobs, moves, resets
):
    """What the items say of the reference is what the policy says when their stage begins; the learning rate goes on from stage to stage."""
    stages: list[tuple[bool, list[float]]] = []
    forgotten: list[int] = []

    def update(self, steps, rates, original=ToyLearner.update):
        items = [item for chosen in steps for item in chosen]
        sequences = [s for item in items for s in item.sequences]
        said = zip(sequences, self.logprobs(sequences), strict=True)
        stages.append((all(np.allclose(s.reference_logprobs, now, atol=1e-6) for s, now in said), list(rates)))
        return original(self, steps, rates)

    monkeypatch.setattr(ToyLearner, "update", update)
    forget = ToyLearner.reset_optimizer
    monkeypatch.setattr(ToyLearner, "reset_optimizer", lambda self: (forgotten.append(len(stages)), forget(self)))
    keys = {"algorithm.name": "curry_dpo", "iterations": 2, "training.lr_scheduler_type": "linear", "metrics.prometheus": False}
    code, message = onlinerl("run", toy_config(tmp_path, keys | knobs))
    assert code == 0, message
    assert len(stages) == (6 if moves else 2), "three stages of the three pairs that four responses make"
    assert all(same for same, _ in stages)
    assert len(forgotten) == resets
    rates = [rate for _, own in stages[: len(stages) // 2] for rate in own]
    assert rates == sorted(rates, reverse=True)
    assert len({*rates}) == len(rates) > 3


@pytest.mark.parametrize("order", [[[0, 1]], [[0, 1, 2, 2]], [[0, 1], [2, 3]], [3, 4], None])
def test_an_order_that_leaves_an_item_out_or_takes_one_twice_is_refused(order):
    class Wrong(Dpo):
        def order(self, items):
            return order

    with pytest.raises(LearnerError, match="order"):
        _stages(Wrong(), [None, None, None])
