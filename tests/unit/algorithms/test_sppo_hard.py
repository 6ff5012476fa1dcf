from __future__ import annotations

import pytest
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.sppo_hard import SppoHard

VARIANTS = [{}, {"beta": 0.1}]
KNOBS = PAIR_KNOBS | {"beta": [({}, 0.3)]}


def at_reference(items):
    return 500_000.0


def test_value_by_hand():
    # targets +-5 against 2 and -1: 9 + 16
    assert evaluate(SppoHard(beta=0.1), [ITEM], ROWS)[0] == pytest.approx(25.0)


def test_about_the_policy_of_the_iterations_start():
    assert SppoHard().reference == "previous"
    assert SppoHard().needs.off_policy == "approximate"


def test_agrees_with_trl():
    assert_agrees_with_dpo(SppoHard(beta=0.05), {"sppo_hard": 1.0}, beta=0.05)
