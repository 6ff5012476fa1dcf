from __future__ import annotations

import numpy as np
import pytest
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair

from onlinerl.algorithms.sppo_hard import SppoHard
from onlinerl.algorithms.sppo_single import SppoSingle

VARIANTS = [{}, {"eta": 1.0}]
KNOBS = PAIR_KNOBS | {"eta": [({}, 10.0)]}


def at_reference(items):
    return float(np.mean([(1000.0 * (item.prob - 0.5)) ** 2 for item in items]))


def test_value_by_hand():
    # targets +-10 (0.8 - 0.5) = +-3 against 2 and -1: (1 + 4) / 2
    assert evaluate(SppoSingle(eta=10.0), [ITEM], ROWS)[0] == pytest.approx(2.5, rel=1e-6)


def test_even_odds_at_the_reference_give_no_loss_and_no_gradient():
    loss, gradient, _, _ = evaluate(SppoSingle(), [pair(*ITEM.sequences, prob=0.5)], [-1.0, -2.0])
    assert loss == 0
    assert gradient.nan_to_num().abs().max() == 0


def test_on_certain_labels_it_is_half_the_hard_form():
    certain = pair(*ITEM.sequences, prob=1.0)
    single, hard = evaluate(SppoSingle(eta=10.0), [certain], ROWS)[0], evaluate(SppoHard(beta=0.1), [certain], ROWS)[0]
    assert single == pytest.approx(hard / 2)
