from __future__ import annotations

import math

import pytest
from algorithm_batches import F_PLUS, ITEM, ROWS, evaluate, pair, sequence
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.aot_unpaired import AotUnpaired

VARIANTS = [{}]
KNOBS = {"beta": [({}, 0.3)], "label_smoothing": [({}, 0.2)], "nll_coef": [({}, 0.5)]}


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    assert evaluate(AotUnpaired(beta=0.1), [ITEM], ROWS)[0] == pytest.approx(F_PLUS, rel=1e-6)


def test_pools_are_compared_by_rank():
    # D_w = (4, 1) and D_l = (3, 0): by rank 1 - 0 and 4 - 3; by pair it would be 1 and 1 too, crosswise 4 - 0 and 1 - 3
    items = [pair(sequence(1), sequence(1, 50)) for _ in range(2)]
    straight = evaluate(AotUnpaired(beta=1.0), items, [4.0, 3.0, 1.0, 0.0])[0]
    crossed = evaluate(AotUnpaired(beta=1.0), items, [4.0, 0.0, 1.0, 3.0])[0]
    assert straight == pytest.approx(math.log1p(math.exp(-1)))
    assert crossed == pytest.approx(straight)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_agrees_with_trl(smoothing):
    ours = AotUnpaired(beta=0.3, label_smoothing=smoothing)
    assert_agrees_with_dpo(ours, {"aot_unpaired": 1.0}, beta=0.3, label_smoothing=smoothing)
