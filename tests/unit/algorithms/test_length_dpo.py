from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.length_dpo import LengthDpo

VARIANTS = [{}, {"length_penalty": 0.2, "soft_labels": True}]
KNOBS = MARGIN_KNOBS


def at_reference(items):
    moved = [0.01 * (len(item.sequences[0].response_ids) - len(item.sequences[1].response_ids)) for item in items]
    return np.mean([math.log1p(math.exp(-z)) for z in moved])


@pytest.mark.parametrize(("penalty", "z"), [(0.01, 0.32), (0.1, 0.5), (-0.1, 0.1)])
def test_value_by_hand(penalty, z):
    """z = 0.3, and the chosen response has two tokens more."""
    assert evaluate(LengthDpo(length_penalty=penalty), [ITEM], ROWS)[0] == pytest.approx(math.log1p(math.exp(-z)), rel=1e-6)
    assert LengthDpo().length_penalty == 0.01


def test_a_longer_chosen_response_is_pushed_less():
    plain, penalized = (evaluate(algorithm, [ITEM], ROWS)[1][0, 0].item() for algorithm in (Dpo(), LengthDpo()))
    assert plain < penalized < 0


def test_without_its_penalty_it_is_dpo():
    one, other = (evaluate(algorithm, [ITEM], ROWS) for algorithm in (LengthDpo(length_penalty=0.0), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
