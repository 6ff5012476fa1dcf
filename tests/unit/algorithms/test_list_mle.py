from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, LIST, LIST_KNOBS, LIST_ROWS, ROWS, evaluate

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.list_mle import ListMle

VARIANTS = [{}, {"nll_coef": 0.3}]
KNOBS = {"beta": [({}, 0.3)]} | LIST_KNOBS


def at_reference(items):
    return float(np.mean([math.log(math.factorial(len(item.sequences))) for item in items]))


def test_value_by_hand():
    # s = (0.2, -0.1, 0.05): (ln 3.177511 - 0.2) + (ln 1.956108 + 0.1) = 0.956098 + 0.770957
    assert evaluate(ListMle(beta=0.1), [LIST], LIST_ROWS)[0] == pytest.approx(1.727055, abs=2e-6)


def test_the_likelihood_of_the_best_response_is_a_term():
    plain, with_nll = (evaluate(ListMle(nll_coef=c), [LIST], LIST_ROWS) for c in (0.0, 2.0))
    assert with_nll[0] - plain[0] == pytest.approx(2.0 * 0.5)  # 0.5 nats for each of its four tokens
    assert (with_nll[1] - plain[1])[0].tolist() == pytest.approx([-0.5] * 4)
    assert torch.equal(with_nll[1][1:], plain[1][1:])


def test_four_equal_responses_cost_the_logarithm_of_their_orders():
    four = replace(LIST, sequences=(*LIST.sequences, LIST.sequences[2]))
    assert evaluate(ListMle(), [four], [-1.0, -2.0, -1.5, -1.5])[0] == pytest.approx(3.178054, rel=1e-6)


def test_of_two_responses_it_is_dpo():
    one, other = evaluate(ListMle(beta=0.1), [ITEM], ROWS), evaluate(Dpo(beta=0.1), [ITEM], ROWS)
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    assert torch.allclose(one[1], other[1], atol=1e-12)


def test_lists_of_different_lengths_do_not_touch_each_other():
    both = evaluate(ListMle(), [LIST, ITEM], [*LIST_ROWS, *ROWS])[0]
    assert both == pytest.approx((evaluate(ListMle(), [LIST], LIST_ROWS)[0] + evaluate(ListMle(), [ITEM], ROWS)[0]) / 2)
