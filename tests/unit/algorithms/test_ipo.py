from __future__ import annotations

import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.ipo import Ipo

VARIANTS = [{}, {"length_norm": True, "tau": 0.01}]
KNOBS = MARGIN_KNOBS | {"tau": [({}, 0.3)]}


def at_reference(items):
    return 25.0


@pytest.mark.parametrize(("knobs", "expected"), [({}, 4.0), ({"tau": 0.25}, 1.0), ({"tau": 0.5, "soft_labels": True}, 6.4)])
def test_value_by_hand(knobs, expected):
    """h = 3 against 5, 2 and 1: with P = 0.8, 0.8 * 2^2 + 0.2 * 4^2."""
    assert evaluate(Ipo(**knobs), [ITEM], ROWS)[0] == pytest.approx(expected, rel=1e-6)


def test_value_and_slope_at_the_reference():
    item = pair(sequence(1), sequence(1, 50))
    loss, gradient, _, _ = evaluate(Ipo(tau=0.2), [item], [0.0, 0.0])
    assert loss == pytest.approx(1 / (4 * 0.2**2))
    assert gradient[:, 0].tolist() == pytest.approx([-1 / 0.2, 1 / 0.2])


@pytest.mark.parametrize(("knobs", "prob", "optimum"), [({}, 1.0, 5.0), ({"soft_labels": True}, 0.8, 3.0)])
def test_the_minimum_is_at_the_constant_and_overshoot_is_pulled_back(knobs, prob, optimum):
    """1 / (2 tau) = 5, and 5 (2 p - 1)."""
    item = pair(sequence(1), sequence(1, 50), prob=prob)
    slopes = [evaluate(Ipo(**knobs), [item], [optimum + step, 0.0])[1][0, 0].item() for step in (-1.0, 0.0, 1.0)]
    assert slopes == pytest.approx([-2.0, 0.0, 2.0], abs=1e-5)


def test_by_length_with_tau_by_the_length_has_the_optimum_of_the_sum():
    item = pair(sequence(4), sequence(4, 50))
    rows = [1.25, 0.0]  # h = 5 by the sum, 1.25 by the mean
    assert evaluate(Ipo(), [item], rows)[1].abs().max() == 0
    assert evaluate(Ipo(length_norm=True, tau=0.4), [item], rows)[1].abs().max() == pytest.approx(0.0, abs=1e-12)


def test_of_log_ratios_per_token_agrees_with_trl():
    assert_agrees_with_dpo(Ipo(length_norm=True, tau=0.3), {"ipo": 1.0}, beta=0.3)


def test_is_finite_far_away():
    item = pair(sequence(1), sequence(1, 50))
    assert torch.isfinite(evaluate(Ipo(), [item], [-1e4, 0.0])[1][:, 0]).all()
