from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair

from onlinerl.algorithms.rebel import Rebel

VARIANTS = [{}, {"eta": 0.1}, {"length_norm": True}]
KNOBS = PAIR_KNOBS | {"eta": [({}, 0.3)], "length_norm": [({}, True)]}


def at_reference(items):
    return float(np.mean([(item.sequences[0].score - item.sequences[1].score) ** 2 for item in items]))


@pytest.mark.parametrize(("eta", "expected"), [(1.0, 4.0), (2.0, 0.25), (3.0, 0.0)])
def test_value_by_hand(eta, expected):
    """h = 3, and the scores are 1.5 and 0.5."""
    assert evaluate(Rebel(eta=eta), [ITEM], ROWS)[0] == pytest.approx(expected, abs=1e-9)


def test_means_over_tokens_by_hand():
    assert evaluate(Rebel(eta=0.5, length_norm=True), [ITEM], ROWS)[0] == pytest.approx((1.0 / 0.5 - 1.0) ** 2)


def test_at_the_reference_it_is_the_squared_gap():
    assert evaluate(Rebel(), [ITEM], [-1.0, -2.0])[0] == pytest.approx(1.0)


def test_a_shift_of_all_scores_of_a_prompt_changes_nothing():
    shifted = pair(*(s.with_(score=s.score + 64.0) for s in ITEM.sequences))
    one, other = (evaluate(Rebel(), [item], ROWS) for item in (ITEM, shifted))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
