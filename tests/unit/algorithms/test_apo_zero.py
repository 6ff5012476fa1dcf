from __future__ import annotations

import pytest
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.apo_zero import ApoZero

VARIANTS = [{}]
KNOBS = PAIR_KNOBS | {"beta": [({}, 0.3)]}


def at_reference(items):
    return 1.0


def test_value_by_hand():
    # 1 - sigmoid(0.2) + sigmoid(-0.1) = 1 - 0.549834 + 0.475021
    assert evaluate(ApoZero(), [ITEM], ROWS)[0] == pytest.approx(0.925187, abs=1e-6)


def test_each_side_moves_by_itself():
    """The slope on the chosen response does not depend on the rejected one."""
    one, other = (evaluate(ApoZero(), [ITEM], rows)[1] for rows in (ROWS, (-0.5, -4.0)))
    assert one[0].tolist() == other[0].tolist()
    assert one[0, 0] < 0 < one[1, 0]


def test_agrees_with_trl():
    assert_agrees_with_dpo(ApoZero(beta=0.4), {"apo_zero": 1.0}, beta=0.4)
