from __future__ import annotations

import pytest
import torch
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, finite_differences, pair, sequence, values

from onlinerl.algorithms.ipo import Ipo
from onlinerl.algorithms.onpo import Onpo
from onlinerl.types.plan import Plan

VARIANTS = [
    {"eta": 2.0},
    {"eta": 2.0, "soft_labels": True},
    {"optimistic": False},
    {"eta": 2.0, "nll_coef": 0.5, "nll_target": "reference_answer"},
]
KNOBS = PAIR_KNOBS | {"eta": [({}, 3.0)], "optimistic": [({}, False)], "soft_labels": [({}, True)]}


def at_reference(items):
    return 1.0


def test_value_by_hand():
    # g = 3, against a target of 4 / 2
    assert evaluate(Onpo(eta=4.0), [ITEM], ROWS)[0] == pytest.approx(1.0)
    # P = 0.8: a target of 5 * 0.3
    assert evaluate(Onpo(eta=5.0, soft_labels=True), [ITEM], ROWS)[0] == pytest.approx(2.25)
    # Where a pass starts, g = 0
    zeros = pair(sequence(3), sequence(2, 50))
    assert evaluate(Onpo(eta=0.125), [zeros], [0.0, 0.0])[0] == pytest.approx(0.00390625)
    assert evaluate(Onpo(), [zeros], [0.0, 0.0])[0] == pytest.approx(2500.0)
    assert Onpo().loss_at_reference == 2500.0


def test_a_pass_is_ipo_against_what_it_starts_from():
    """1 / (2 tau) = eta / 2."""
    assert evaluate(Onpo(eta=4.0), [ITEM], ROWS)[0] == pytest.approx(evaluate(Ipo(tau=0.25), [ITEM], ROWS)[0])


@pytest.mark.parametrize("knobs", [{"eta": 4.0}, {"eta": 5.0, "soft_labels": True}])
def test_gradient_is_the_slope_of_the_value(knobs):
    _, gradient, _, batch = evaluate(Onpo(**knobs), [ITEM], ROWS)
    assert gradient[batch.mask_BT].tolist() == pytest.approx(
        finite_differences(Onpo(**knobs), [ITEM], ROWS)[batch.mask_BT].tolist(), rel=1e-6
    )
    assert torch.equal(gradient != 0, batch.mask_BT)


def test_an_even_pair_asks_for_no_change():
    even = pair(*ITEM.sequences, prob=0.5)
    rows = [-1.0, -2.0]  # as where the pass started
    loss, gradient, _, _ = evaluate(Onpo(soft_labels=True), [even], rows)
    assert loss == 0
    assert not gradient.any()
    assert Onpo(soft_labels=True).loss_at_reference is None


def test_metrics_are_in_units_of_win_rate():
    metrics = values(evaluate(Onpo(eta=4.0), [ITEM], ROWS)[2])
    assert metrics["z"] == pytest.approx(0.75)
    assert metrics["margin"] == pytest.approx(3.0)


def test_two_passes_need_auxiliary_weights_and_one_the_iterate_before():
    two, one = Onpo(), Onpo(optimistic=False)
    assert (two.needs.auxiliary, two.needs.reference, two.reference) == (True, False, "none")
    assert (one.needs.auxiliary, one.needs.reference, one.reference) == (False, True, "previous")
    assert [a.needs.preferences for a in (two, one, Onpo(soft_labels=True))] == [False, False, True]


def test_two_passes_over_pairs_of_an_older_policy_are_refused():
    lagging = Plan(iterations=3, references=(None,) * 3, max_lag=1)
    refused = Onpo().objection(lagging)
    assert refused is not None
    assert refused.field == "schedule.max_lag"
    assert "algorithm.optimistic=false" in refused.fix
    assert Onpo(optimistic=False).objection(lagging) is None
    assert Onpo().objection(Plan(iterations=3, references=(None,) * 3)) is None
