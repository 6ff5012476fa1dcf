"""Items that an algorithm orders into stages, on the toy engine and learner."""

from __future__ import annotations

import numpy as np
import pytest
from toy_runs import weights

from onlinerl.algorithms.dpo import Dpo
from onlinerl.controller.phases.train import _stages
from onlinerl.errors import LearnerError

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
    curry = learned("curry", FIXED | two | {"algorithm.name": "curry_dpo"})
    assert np.array_equal(curry, learned("dpo", two | {"iterations": 2}))


def test_one_stage_is_dpo_on_the_same_pairs_and_more_stages_are_not(learned):
    curry = FIXED | {"algorithm.name": "curry_dpo"}
    plain = learned("dpo", {"pairing.name": "best_rest", "iterations": 2})
    assert np.array_equal(learned("one", curry | {"algorithm.stages": 1}), plain)
    assert not np.array_equal(learned("more", curry), plain)


@pytest.mark.parametrize("order", [[[0, 1]], [[0, 1, 2, 2]], [[0, 1], [2, 3]], [3, 4], None])
def test_an_order_that_leaves_an_item_out_or_takes_one_twice_is_refused(order):
    class Wrong(Dpo):
        def order(self, items):
            return order

    with pytest.raises(LearnerError, match="order"):
        _stages(Wrong(), [None, None, None])
