from __future__ import annotations

import math

import numpy as np
import pytest
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair, sequence

from onlinerl.algorithms.irepo import Irepo

VARIANTS = [{}, {"beta": 0.5, "prob_clip": 0.1}, {"length_norm": True}]
KNOBS = PAIR_KNOBS | {"beta": [({}, 0.3)], "prob_clip": [({}, 0.3)], "length_norm": [({}, True)]}


def at_reference(items):
    probs = np.clip([item.prob for item in items], 0.02, 0.98)
    return float(np.mean(np.log(probs / (1 - probs)) ** 2))


def test_value_by_hand():
    # logit(0.8) = ln 4 = 1.386294 against beta h = 0.3
    assert evaluate(Irepo(), [ITEM], ROWS)[0] == pytest.approx((1.386294 - 0.3) ** 2, rel=1e-5)
    assert evaluate(Irepo(), [ITEM], [-1.0, -2.0])[0] == pytest.approx(1.921812, rel=1e-6)  # at the reference


def test_means_over_tokens_by_hand():
    # Dbar = 0.5 and -0.5 against ln 4
    assert evaluate(Irepo(length_norm=True), [ITEM], ROWS)[0] == pytest.approx((1.386294 - 0.1) ** 2, rel=1e-5)


@pytest.mark.parametrize(("prob", "target"), [(0.8, 1.386294), (0.5, 0.0), (1.0, math.log(49)), (0.0, -math.log(49))])
def test_the_minimum_is_at_the_logit_of_the_clipped_probability(prob, target):
    item = pair(sequence(1), sequence(1, 50), prob=prob)
    loss, gradient, _, _ = evaluate(Irepo(beta=0.5), [item], [target / 0.5, 0.0])
    assert loss == pytest.approx(0.0, abs=1e-9)
    assert gradient.abs().max() < 1e-4
