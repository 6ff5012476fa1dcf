from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import LIST, LIST_KNOBS, LIST_ROWS, evaluate, items_of, judged, values

from onlinerl.algorithms.triple_po import TriplePo

VARIANTS = [{}, {"nll_norm": "batch_tokens"}]
KNOBS = {"beta": [({}, 0.3)]} | LIST_KNOBS


def at_reference(items):
    def cost(item):
        gold, won, lost = (s.behavior_logprobs for s in item.sequences)
        return np.log1p(np.exp(-0.01 * float(won.sum() - lost.sum()))) - float(gold.mean())

    return float(np.mean([cost(item) for item in items]))


def test_value_by_hand():
    # S_w - S_l = -5 + 1, so f(-0.4) = 0.913015; the best response has 0.5 nats a token
    assert evaluate(TriplePo(beta=0.1), [LIST], LIST_ROWS)[0] == pytest.approx(1.413015, abs=1e-6)


@pytest.mark.parametrize(("norm", "nats"), [("per_token", 0.75), ("batch_tokens", 0.6), ("sum", 1.5)])
def test_the_likelihood_of_the_best_responses_by_hand(norm, nats):
    """Of 4 tokens with 0.5 nats each, and of one with 1: a mean of (0.5 + 1) / 2, over all tokens 3 / 5, and (2 + 1) / 2."""
    lists = [LIST, replace(LIST, sequences=(LIST.sequences[2], *LIST.sequences[:2]))]
    rows = [*LIST_ROWS, LIST_ROWS[2], *LIST_ROWS[:2]]
    with_nll, without = (TriplePo(nll_norm=norm, nll_coef=c) for c in (2.0, 0.0))
    losses = [evaluate(one, list(one.prepare(lists)), rows) for one in (with_nll, without)]
    assert losses[0][0] - losses[1][0] == pytest.approx(2.0 * nats, rel=1e-6)
    assert values(losses[0][2])["chosen_nll"] == pytest.approx(0.75)
    assert torch.equal(losses[0][1][1:3], losses[1][1][1:3])


def test_a_mean_length_that_nobody_filled_in_is_noticed():
    with pytest.raises(ValueError, match="nll_tokens_G"):
        evaluate(TriplePo(nll_norm="batch_tokens"), [LIST], LIST_ROWS)


def test_trains_the_best_the_second_and_the_worst():
    (item,) = items_of(TriplePo(), judged([1, 2, 3, 4, 5], scores=(0.0, 4.0, 1.0, 3.0, 2.0)))
    assert [s.score for s in item.sequences] == [4.0, 3.0, 0.0]


def test_two_responses_are_too_few_and_counted():
    items, dropped = TriplePo().items(judged([1, 2], scores=(0.0, 4.0)), [])
    assert items == []
    assert dropped == {"single": 2}
    assert TriplePo().needs.min_samples == 3
