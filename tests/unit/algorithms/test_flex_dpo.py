from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.flex_dpo import FlexDpo

VARIANTS = [{}]
KNOBS = MARGIN_KNOBS


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    # z = 0.1 * 2 - 0.05 * -1 = 0.25, and log(1 + exp(-0.25))
    assert evaluate(FlexDpo(), [ITEM], ROWS)[0] == pytest.approx(0.575939396, rel=1e-7)


def test_with_equal_betas_it_is_dpo():
    one, other = (evaluate(a, [ITEM], ROWS) for a in (FlexDpo(beta_rejected=0.1), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_the_gradients_of_the_two_sides_are_as_their_betas():
    gradient = evaluate(FlexDpo(beta=0.1, beta_rejected=0.03), [ITEM], ROWS)[1]
    assert gradient[1, 0].item() / -gradient[0, 0].item() == pytest.approx(0.3)


def test_with_beta_rejected_0_the_rejected_response_gets_no_gradient():
    gradient = evaluate(FlexDpo(beta_rejected=0.0), [ITEM], ROWS)[1]
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0
