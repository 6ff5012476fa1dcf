from __future__ import annotations

import math

import pytest
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.ln_dpo import LnDpo

VARIANTS = [{}]
KNOBS = MARGIN_KNOBS | {"length_norm": [({}, False)]}


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    # D_w / 4 = 0.5 and D_l / 2 = -0.5, so z = 5, and log(1 + exp(-5))
    assert evaluate(LnDpo(), [ITEM], ROWS)[0] == pytest.approx(0.006715348, rel=1e-6)


def test_at_equal_lengths_it_is_dpo_with_beta_by_the_length():
    item = pair(sequence(5, reference_logprobs=-1.0), sequence(5, 50, reference_logprobs=-1.5))
    rows = [-0.7, -1.9]
    assert evaluate(LnDpo(beta=0.5), [item], rows)[0] == pytest.approx(evaluate(Dpo(beta=0.1), [item], rows)[0])


def test_agrees_with_trl():
    assert_agrees_with_dpo(LnDpo(), {"sigmoid_norm": 1.0}, beta=5.0)
