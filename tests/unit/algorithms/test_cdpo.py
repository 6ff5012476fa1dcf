from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_MINUS, F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence

from onlinerl.algorithms.cdpo import Cdpo
from onlinerl.algorithms.dpo import Dpo

VARIANTS = [{}]
KNOBS = MARGIN_KNOBS


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    assert evaluate(Cdpo(), [ITEM], ROWS)[0] == pytest.approx(0.9 * F_PLUS + 0.1 * F_MINUS, rel=1e-7)


def test_without_smoothing_it_is_dpo():
    one, other = (evaluate(a, [ITEM], ROWS) for a in (Cdpo(label_smoothing=0.0), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_the_minimum_is_at_the_logit_of_nine_tenths():
    item = pair(sequence(1), sequence(1, 50))
    at = [evaluate(Cdpo(beta=1.0), [item], [2.1972246 + step, 0.0])[0] for step in (-0.01, 0.0, 0.01)]
    assert at[1] < min(at[0], at[2])
