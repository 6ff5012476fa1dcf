from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_MINUS, F_PLUS, ITEM, ROWS, evaluate, pair, sequence
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.aot import Aot
from onlinerl.algorithms.dpo import Dpo

VARIANTS = [{}, {"label_smoothing": 0.1, "nll_coef": 0.3}]
KNOBS = {"beta": [({}, 0.3)], "label_smoothing": [({}, 0.2)], "nll_coef": [({}, 0.5)]}


def at_reference(items):
    return math.log(2)


def pairs(*reference: float):
    """Pairs of single tokens whose reference margins are these."""
    return [pair(sequence(1, reference_logprobs=m), sequence(1, 50)) for m in reference]


def f(z: float) -> float:
    return math.log1p(math.exp(-z))


@pytest.mark.parametrize(("knobs", "expected"), [({}, F_PLUS), ({"label_smoothing": 0.2}, 0.8 * F_PLUS + 0.2 * F_MINUS)])
def test_value_by_hand(knobs, expected):
    assert evaluate(Aot(beta=0.1, **knobs), [ITEM], ROWS)[0] == pytest.approx(expected, rel=1e-6)


def test_the_likelihood_of_chosen_responses_is_a_term():
    plain, with_nll = (evaluate(Aot(nll_coef=c), [ITEM], ROWS) for c in (0.0, 2.0))
    assert with_nll[0] - plain[0] == pytest.approx(2.0 * 0.5)
    assert torch.equal(with_nll[1][1, :2], plain[1][1, :2])
    assert (Aot().loss_at_reference, Aot(nll_coef=2.0).loss_at_reference) == (pytest.approx(math.log(2)), None)


def test_margins_are_compared_by_rank_and_not_by_pair():
    # The policy's margins 3, 0, 1 against the reference's 0, 2, 1: by rank 0 - 0, 1 - 1, 3 - 2
    loss, gradient, _, _ = evaluate(Aot(beta=1.0), pairs(0.0, 2.0, 1.0), [3.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert loss == pytest.approx((2 * math.log(2) + f(1.0)) / 3)
    assert gradient[:, 0].tolist() == pytest.approx([s / 3 for s in (-0.268941, 0.268941, -0.5, 0.5, -0.5, 0.5)], abs=1e-6)


def test_a_step_of_one_pair_is_dpo():
    one, other = evaluate(Aot(beta=0.1), [ITEM], ROWS), evaluate(Dpo(beta=0.1), [ITEM], ROWS)
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert torch.allclose(one[1], other[1], atol=1e-7)


def test_pairs_of_weight_0_are_not_among_the_ranks():
    with_it = [*pairs(0.0, 2.0), pair(*pairs(9.0)[0].sequences, weight=0.0)]
    loss = evaluate(Aot(beta=1.0), with_it, [3.0, 0.0, 0.0, 0.0, 5.0, 0.0])[0]
    assert 3 * loss == pytest.approx(2 * evaluate(Aot(beta=1.0), pairs(0.0, 2.0), [3.0, 0.0, 0.0, 0.0])[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_agrees_with_trl(smoothing):
    assert_agrees_with_dpo(Aot(beta=0.3, label_smoothing=smoothing), {"aot": 1.0}, beta=0.3, label_smoothing=smoothing)
