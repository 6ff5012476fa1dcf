from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from algorithm_batches import F_PLUS, ITEM, LIST, LIST_KNOBS, LIST_ROWS, ROWS, evaluate, items_of, judged

from onlinerl.algorithms.lipo_lambda import LipoLambda
from onlinerl.types import TrainItem

VARIANTS = [{}, {"list_reduce": "mean_pairs", "beta": 0.5, "nll_coef": 0.3}]
KNOBS = {"beta": [({}, 0.3)], "list_reduce": [({}, "mean_pairs")]} | LIST_KNOBS


def at_reference(items):
    """All values are equal, so ranks are those of the labels, and every pair costs ln 2 times its weight."""

    def cost(rates):
        pairs = [(i, j) for i in range(len(rates)) for j in range(i + 1, len(rates))]
        return sum((2 ** rates[i] - 2 ** rates[j]) * abs(1 / math.log(i + 2) - 1 / math.log(j + 2)) for i, j in pairs)

    return float(np.mean([math.log(2) * cost([s.win_rate for s in item.sequences]) for item in items]))


def rated(*rates: float) -> TrainItem:
    return replace(LIST, sequences=tuple(s.with_(win_rate=r) for s, r in zip(LIST.sequences, rates, strict=False)))


def test_value_by_hand():
    """s = (0.2, -0.1, 0.05), so the ranks are 1, 3 and 2, with discounts 1.442695, 0.721348 and 0.910239; gains are 0.866066, 0.414214 and
    0.071773: 0.325943 f(0.3) + 0.422926 f(0.15) + 0.064684 f(-0.15)."""
    assert evaluate(LipoLambda(beta=0.1), [LIST], LIST_ROWS)[0] == pytest.approx(0.493176, abs=3e-6)
    assert evaluate(LipoLambda(beta=0.1, list_reduce="mean_pairs"), [LIST], LIST_ROWS)[0] == pytest.approx(
        0.493176 / 3, abs=1e-6
    )


def test_two_responses_that_are_certain_are_dpo_by_a_constant():
    # 1 / ln 2 - 1 / ln 3
    assert evaluate(LipoLambda(beta=0.1), [rated(1.0, 0.0)], ROWS)[0] == pytest.approx(0.532456 * F_PLUS, rel=1e-5)
    assert evaluate(LipoLambda(), [rated(1.0, 0.0)], [-1.0, -2.0])[0] == pytest.approx(0.369070, rel=1e-5)


@pytest.mark.parametrize(("rates", "largest"), [((0.99, 0.5, 0.01), 0.706), ((0.51, 0.5, 0.49), 0.014)])
def test_lists_without_a_winner_weigh_little(rates, largest):
    """Slopes at the reference are half the weights; the best response has those of two pairs."""
    gradient = evaluate(LipoLambda(beta=1.0), [rated(*rates)], [-1.0, -2.0, -1.5])[1]
    near = (2 ** rates[0] - 2 ** rates[1]) * (1 / math.log(2) - 1 / math.log(3))
    assert -2 * gradient[0, 0].item() - near == pytest.approx(largest, abs=5e-4)


def test_equal_labels_teach_nothing():
    loss, gradient, _, _ = evaluate(LipoLambda(), [rated(0.5, 0.5, 0.5)], LIST_ROWS)
    assert loss == 0
    assert gradient.nan_to_num().abs().max() == 0


def test_the_order_of_the_responses_changes_nothing():
    group = judged([2, 3, 4], scores=(0.1, 2.0, 1.0))
    order = [2, 0, 1]
    mixed = replace(
        group,
        group=replace(group.group, rollouts=tuple(group.group.rollouts[i] for i in order)),
        verdict=replace(group.verdict, scores=tuple(group.verdict.scores[i] for i in order)),
    )
    (one,), (other,) = items_of(LipoLambda(), group), items_of(LipoLambda(), mixed)
    assert [s.response_ids for s in one.sequences] == [s.response_ids for s in other.sequences]
    assert [s.score for s in one.sequences] == [2.0, 1.0, 0.1]


def test_identical_responses_count_once():
    group = judged([2, 3, 3], scores=(0.0, 1.0, 2.0))
    rollouts = group.group.rollouts
    twin = replace(rollouts[2], token_ids=rollouts[1].token_ids)
    group = replace(group, group=replace(group.group, rollouts=(*rollouts[:2], twin)))
    (item,), dropped = LipoLambda().items(group, [])
    assert [s.score for s in item.sequences] == [1.0, 0.0]
    assert dropped == {"identical": 1}
    assert ITEM.count("list") == item.count("list") == 1
