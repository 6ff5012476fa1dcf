from __future__ import annotations

import pytest
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.apo_down import ApoDown

VARIANTS = [{}]
KNOBS = PAIR_KNOBS | {"beta": [({}, 0.3)]}


def at_reference(items):
    return 1.0


def test_value_by_hand():
    # sigmoid(0.2) + 1 - sigmoid(0.3) = 0.549834 + 1 - 0.574443
    assert evaluate(ApoDown(), [ITEM], ROWS)[0] == pytest.approx(0.975391, abs=1e-6)


def test_the_rejected_response_loses_and_far_ahead_the_chosen_one_does_too():
    gradient = evaluate(ApoDown(beta=1.0), [ITEM], [-0.75, -6.0])[1]  # r_w = 1, r_l = -8
    assert gradient[0, 0] > 0
    assert gradient[1, 0] > 0


def test_agrees_with_trl():
    assert_agrees_with_dpo(ApoDown(beta=0.4), {"apo_down": 1.0}, beta=0.4)
