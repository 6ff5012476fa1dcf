from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_MINUS, F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence
from pydantic import ValidationError
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.robust_dpo import RobustDpo

VARIANTS = [{}]
KNOBS = MARGIN_KNOBS


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    assert evaluate(RobustDpo(), [ITEM], ROWS)[0] == pytest.approx((0.9 * F_PLUS - 0.1 * F_MINUS) / 0.8, rel=1e-7)


def test_on_average_over_flipped_labels_it_is_dpo_on_the_right_ones():
    flipped = pair(*reversed(ITEM.sequences))
    right, wrong = evaluate(RobustDpo(), [ITEM], ROWS)[0], evaluate(RobustDpo(), [flipped], ROWS[::-1])[0]
    assert 0.9 * right + 0.1 * wrong == pytest.approx(F_PLUS, rel=1e-6)


def test_without_flips_it_is_dpo():
    one, other = (evaluate(a, [ITEM], ROWS) for a in (RobustDpo(flip_rate=0.0), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_beyond_the_cap_a_pair_teaches_nothing_where_the_loss_would_fall_without_end():
    item = pair(sequence(1), sequence(1, 50))
    knobs = {"beta": 1.0, "flip_rate": 0.25}
    capped, free = (evaluate(RobustDpo(**knobs, margin_cap=cap), [item], [9.0, 0.0])[1] for cap in (8.0, 1e9))
    assert capped.abs().max() == 0
    assert free[0, 0].item() == pytest.approx(-0.25 / 0.5, abs=1e-3)


def test_flips_without_a_cap_are_refused():
    with pytest.raises(ValidationError, match="unbounded below"):
        RobustDpo(margin_cap=None)


@pytest.mark.parametrize("rate", [0.5, -0.1])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValidationError):
        RobustDpo(flip_rate=rate)


def test_agrees_with_trl():
    assert_agrees_with_dpo(RobustDpo(flip_rate=0.3), {"robust": 1.0}, beta=0.1, label_smoothing=0.3)
