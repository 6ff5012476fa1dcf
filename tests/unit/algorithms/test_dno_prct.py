from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import MARGIN_KNOBS, evaluate, items_of, judged, pair, sequence

from onlinerl.algorithms.dno_prct import DnoPrct
from onlinerl.algorithms.dpo import Dpo
from onlinerl.types import Pair

VARIANTS = [{}, {"margin": -1.0, "floor": -10.0, "nll_coef": 0.1}]
KNOBS = MARGIN_KNOBS | {"floor": [({}, 0.5)], "margin": [({}, 0.5)]}
PAIRS = [Pair(chosen=2, rejected=0, prob=0.9), Pair(chosen=2, rejected=1, prob=0.8), Pair(chosen=1, rejected=0, prob=0.7)]


def at_reference(items):
    return math.log(2)


def item(rate_1: float, rate_2: float, **changes):
    return pair(
        sequence(2, reference_logprobs=-1.0, win_rate=rate_1),
        sequence(4, 50, reference_logprobs=-1.0, win_rate=rate_2),
        **changes,
    )


def test_value_by_hand():
    # D_w = 2 (-0.5 + 1) = 1 and D_l = 4 (-1.5 + 1) = -2, so z = 0.3
    assert evaluate(DnoPrct(), [item(0.9, 0.1)], [-0.5, -1.5])[0] == pytest.approx(0.554355244, rel=1e-7)


def test_without_filters_is_dpo_against_the_previous_policy():
    group = judged([1, 2, 3], scores=(0.0, 1.0, 2.0))
    assert (
        [i.prob for i in items_of(DnoPrct(), group, PAIRS)]
        == [i.prob for i in items_of(Dpo(), group, PAIRS)]
        == [0.9, 0.8, 0.7]
    )
    assert DnoPrct().reference == "previous"
    for knobs in ({}, {"beta": 0.5, "label_smoothing": 0.2}):
        ours, theirs = (evaluate(cls(**knobs), [item(0.9, 0.1)], [-0.4, -1.3]) for cls in (DnoPrct, Dpo))
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("knobs", "kept", "counted"),
    [
        ({"floor": 5.0}, [0.9, 0.8], {"floor": 1}),  # the winner of the third pair scores 4
        ({"margin": 2.0}, [0.9, 0.7], {"gap": 1}),  # gaps are 3, 1 and 2
        ({"floor": 5.0, "margin": 2.0}, [0.9], {"floor": 1, "gap": 1}),
        ({"floor": 5.5}, [], {"floor": 3}),
    ],
)
def test_filters_by_the_oracles_scores_and_counts(knobs, kept, counted):
    items, dropped = DnoPrct(**knobs).items(judged([1, 2, 3], scores=(2.0, 4.0, 5.0)), PAIRS)
    assert ([i.prob for i in items], dropped) == (kept, counted)


def test_filters_by_win_rates_where_the_oracle_gives_no_scores():
    even = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.1), (0.5, 0.9, 0.5))
    items, _ = DnoPrct(margin=0.2).items(judged([1, 2, 3], preferences=even), PAIRS)
    assert [i.prob for i in items] == [0.8]  # win rates 0.5, 0.3667 and 0.6333
