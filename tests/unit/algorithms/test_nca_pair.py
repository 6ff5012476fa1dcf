from __future__ import annotations

import math

import pytest
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair, sequence
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.nca_pair import NcaPair

VARIANTS = [{}]
KNOBS = PAIR_KNOBS | {"beta": [({}, 0.3)]}


def at_reference(items):
    return 2 * math.log(2)


def test_value_by_hand():
    # f(0.2) + f(-0.2) / 2 + f(0.1) / 2 = 0.598139 + 0.399070 + 0.322198
    assert evaluate(NcaPair(beta=0.1), [ITEM], ROWS)[0] == pytest.approx(1.319407, abs=2e-6)


def test_the_chosen_response_has_a_best_reward_of_log_2():
    item = pair(sequence(1), sequence(1, 50))
    slopes = [evaluate(NcaPair(beta=1.0), [item], [math.log(2) + step, 0.0])[1][0, 0].item() for step in (-0.1, 0.0, 0.1)]
    assert slopes[0] < 0 < slopes[2]
    assert slopes[1] == pytest.approx(0.0, abs=1e-9)


def test_agrees_with_trl():
    assert_agrees_with_dpo(NcaPair(beta=0.4), {"nca_pair": 1.0}, beta=0.4)
