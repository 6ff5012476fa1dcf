from __future__ import annotations

import numpy as np
import pytest
from algorithm_batches import LIST, LIST_ROWS, evaluate, items_of, judged

from onlinerl.algorithms.triple_po import TriplePo

VARIANTS = [{}]
KNOBS = {"beta": [({}, 0.3)], "nll_coef": [({}, 0.5)]}


def at_reference(items):
    def cost(item):
        gold, won, lost = (s.behavior_logprobs for s in item.sequences)
        return np.log1p(np.exp(-0.01 * float(won.sum() - lost.sum()))) - float(gold.mean())

    return float(np.mean([cost(item) for item in items]))


def test_value_by_hand():
    # S_w - S_l = -5 + 1, so f(-0.4) = 0.913015; the best response has 0.5 nats a token
    assert evaluate(TriplePo(beta=0.1), [LIST], LIST_ROWS)[0] == pytest.approx(1.413015, abs=1e-6)


def test_trains_the_best_the_second_and_the_worst():
    (item,) = items_of(TriplePo(), judged([1, 2, 3, 4, 5], scores=(0.0, 4.0, 1.0, 3.0, 2.0)))
    assert [s.score for s in item.sequences] == [4.0, 3.0, 0.0]


def test_two_responses_are_too_few_and_counted():
    items, dropped = TriplePo().items(judged([1, 2], scores=(0.0, 4.0)), [])
    assert items == []
    assert dropped == {"single": 2}
    assert TriplePo().needs.min_samples == 3
