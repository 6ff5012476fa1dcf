from __future__ import annotations

import math

import pytest
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.nbpo import Nbpo

VARIANTS = [{}]
KNOBS = MARGIN_KNOBS | {"eps": [({}, 0.3)]}


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    # sigmoid(0.3) = 0.574442517: -log(0.9 * 0.574442517 + 0.1 * 0.425557483) = -log(0.559554014)
    assert evaluate(Nbpo(), [ITEM], ROWS)[0] == pytest.approx(0.580615088, rel=1e-6)


@pytest.mark.parametrize(("z", "bound"), [(50.0, -math.log(0.9)), (-50.0, -math.log(0.1))])
def test_is_bounded_on_both_sides_and_flat_there(z, bound):
    item = pair(sequence(1), sequence(1, 50))
    loss, gradient, _, _ = evaluate(Nbpo(beta=1.0), [item], [z, 0.0])
    assert loss == pytest.approx(bound, abs=1e-9)
    assert gradient.abs().max() < 1e-9


def test_with_few_flips_it_is_dpo():
    assert evaluate(Nbpo(eps=1e-9), [ITEM], ROWS)[0] == pytest.approx(evaluate(Dpo(), [ITEM], ROWS)[0], rel=1e-6)


def test_the_slope_is_that_of_the_likelihood():
    # d/dz -log(e + (1 - 2e) s) = -(1 - 2e) s (1 - s) / (e + (1 - 2e) s)
    s = 0.574442517
    slope = -0.8 * s * (1 - s) / (0.1 + 0.8 * s)
    assert evaluate(Nbpo(), [ITEM], ROWS)[1][0, 0].item() == pytest.approx(0.1 * slope, rel=1e-6)
