from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from algorithm_batches import (
    F_MINUS,
    F_PLUS,
    ITEM,
    MARGIN_KNOBS,
    ROWS,
    evaluate,
    finite_differences,
    items_of,
    judged,
    pair,
    sequence,
)

from onlinerl.algorithms.dpo_nll import DpoNll
from onlinerl.algorithms.upo import Upo
from onlinerl.types import Pair

LOG2 = math.log(2)
VARIANTS = [{}, {"mu": 0.0, "nll_coef": 0.0, "beta": 0.5}, {"unfiltered": 0.5, "label_smoothing": 0.1}]
KNOBS = (
    {name: changes for name, changes in MARGIN_KNOBS.items() if name != "soft_labels"}
    | {"mu": [({}, 0.0), ({}, 5.0)], "unfiltered": [({"mu": 5.0}, 1.0)], "soft_labels": []}
)  # fmt: skip


def at_reference(items):
    chosen = [item.sequences[0].behavior_logprobs for item in items]
    return LOG2 - sum(float(logprobs.mean()) for logprobs in chosen) / len(chosen)


def group(nats: float, K: int = 2):
    return judged([2] * K, scores=tuple(float(-k) for k in range(K)), uncertainty=((nats,) * K,) * K)


def test_value_by_hand():
    """a = (log 2 / 2) / (2 log 2) = 1/4; the mean log-prob of the chosen response is -0.5."""
    (item,) = items_of(Upo(mu=0.0), group(LOG2 / 2), [Pair(chosen=0, rejected=1, prob=0.6)])
    assert item.prob == 0.75
    trained = pair(*ITEM.sequences, prob=item.prob)
    assert evaluate(Upo(), [trained], ROWS)[0] == pytest.approx(0.75 * F_PLUS + 0.25 * F_MINUS + 0.5, rel=1e-7)


def test_the_gradient_is_the_slope_of_the_loss():
    trained = pair(*ITEM.sequences, prob=0.75)
    assert torch.allclose(evaluate(Upo(), [trained], ROWS)[1], finite_differences(Upo(), [trained], ROWS), atol=1e-8)


def test_where_judges_agree_it_is_dpo_with_the_likelihood():
    (item,) = items_of(Upo(), group(0.0), [Pair(chosen=0, rejected=1, prob=0.6)])
    certain = pair(*ITEM.sequences, prob=item.prob)
    one, other = evaluate(Upo(), [certain], ROWS), evaluate(DpoNll(), [ITEM], ROWS)
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_where_nothing_is_known_the_label_pulls_nowhere():
    upo = Upo(mu=0.0, nll_coef=0.0)
    (item,) = items_of(upo, group(LOG2), [Pair(chosen=0, rejected=1, prob=0.9)])
    even = pair(sequence(4, reference_logprobs=-0.5), sequence(2, 50, reference_logprobs=-2.5), prob=item.prob)
    assert item.prob == 0.5
    assert evaluate(upo, [even], ROWS)[1].abs().max() == 0
    assert Upo().items(group(LOG2), [Pair(chosen=0, rejected=1, prob=0.9)]) == ([], Counter(uncertain=1))


@pytest.mark.parametrize(("knobs", "share"), [({}, 0.75), ({"mu": 2.0}, 0.5625), ({"unfiltered": 0.4}, 0.85)])
def test_pairs_are_kept_as_often_as_the_formula_says(knobs, share):
    """B / log 2 is a quarter: of 1,560 pairs within three standard deviations."""
    K = 40
    pairs = [Pair(chosen=i, rejected=j, prob=0.9) for i in range(K) for j in range(K) if i != j]
    kept, dropped = Upo(**knobs).items(group(LOG2 / 4, K), pairs)
    assert len(kept) + dropped["uncertain"] == len(pairs)
    assert len(kept) / len(pairs) == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / len(pairs)))
    again = Upo(**knobs).items(group(LOG2 / 4, K), pairs)[0]
    assert [repr(item) for item in again] == [repr(item) for item in kept]


@pytest.mark.parametrize("said", [None, ((0.0, math.nan), (math.nan, 0.0))])
def test_a_pair_of_which_nobody_says_how_uncertain_it_is_is_left_out(said):
    unknown = judged([2, 2], scores=(1.0, 0.0), uncertainty=said)
    assert Upo().items(unknown, [Pair(chosen=0, rejected=1, prob=0.9)]) == ([], Counter(no_uncertainty=1))
