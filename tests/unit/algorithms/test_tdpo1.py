from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair, sequence, values
from pydantic import ValidationError
from torch import Tensor

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.tdpo1 import Tdpo1
from onlinerl.algorithms.tdpo2 import Tdpo2

VARIANTS = [{}, {"soft_labels": True, "label_smoothing": 0.1, "nll_coef": 0.5}, {"flip_rate": 0.1, "margin_cap": 5.0}]
KNOBS = PAIR_KNOBS | {
    "beta": [({}, 0.3)],
    "soft_labels": [({}, True)],
    "label_smoothing": [({}, 0.2)],
    "margin_cap": [({}, 0.01)],
    "flip_rate": [({"margin_cap": 10.0}, 0.2)],
}
KLS = [[0.1, 0.3, 0.0, 0.2], [1.0, 0.4]]
"""Of `ITEM`: K_w = 0.6 and K_l = 1.4."""


def at_reference(items):
    return math.log(2)


def kls(rows: list[list[float]] = KLS) -> Tensor:
    """Padded to four tokens with what nothing may read."""
    return torch.tensor([row + [float("nan")] * (4 - len(row)) for row in rows], dtype=torch.float64).requires_grad_()


# z = 0.1 (3 + 0.6 - 1.4) = 0.22: ln(1 + exp(-0.22)) = 0.589185 and ln(1 + exp(0.22)) = 0.809185
@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, 0.589185),
        ({"label_smoothing": 0.1}, 0.9 * 0.589185 + 0.1 * 0.809185),
        ({"soft_labels": True}, 0.8 * 0.589185 + 0.2 * 0.809185),
        # (0.9 - 0.1) / (1 - 0.2) is 1 with smoothed labels; without, (1 - 0.1) / 0.8 = 1.125
        ({"flip_rate": 0.1, "margin_cap": 9.0}, 1.125 * 0.589185 - 0.125 * 0.809185),
        ({"label_smoothing": 0.1, "flip_rate": 0.1, "margin_cap": 9.0}, 0.589185),
        ({"nll_coef": 2.0}, 0.589185 + 2.0 * 0.5),
        ({"margin_cap": 0.1}, 0.644397),  # ln(1 + exp(-0.1))
    ],
)
def test_value_by_hand(knobs, expected):
    assert evaluate(Tdpo1(**knobs), [ITEM], ROWS, reference_kl_BT=kls())[0] == pytest.approx(expected, abs=2e-6)


def test_slopes_by_hand():
    """0.1 sigmoid(-0.22) = 0.0445221 per nat, the KL of the chosen response up and that of the rejected one down."""
    given = kls()
    _, gradient, out, _ = evaluate(Tdpo1(), [ITEM], ROWS, reference_kl_BT=given)
    (slopes,) = torch.autograd.grad(out.total, given)
    assert slopes[0].tolist() == pytest.approx([-0.0445221] * 4, rel=1e-5)
    assert slopes[1].tolist() == pytest.approx([0.0445221] * 2 + [0.0] * 2, rel=1e-5)
    assert gradient[:, 0].tolist() == pytest.approx([-0.0445221, 0.0445221], rel=1e-5)


def test_without_a_kl_it_is_dpo():
    nothing = kls([[0.0] * 4, [0.0] * 2])
    for rows in (ROWS, [-1.0, -2.0]):  # the second is the reference
        one, other = evaluate(Tdpo1(), [ITEM], rows, reference_kl_BT=nothing), evaluate(Dpo(), [ITEM], rows)
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_metrics_by_hand():
    metrics = values(evaluate(Tdpo1(), [ITEM], ROWS, reference_kl_BT=kls())[2])
    expected = {"chosen_reference_kl": 0.6, "rejected_reference_kl": 1.4, "z": 0.22, "margin": 3.0, "chosen_log_ratio": 2.0}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_swapping_chosen_and_rejected_flips_the_slope_at_zero_margin():
    one, other = sequence(3, reference_logprobs=-1.0), sequence(3, 50, reference_logprobs=-1.0)
    for algorithm in (Tdpo1(label_smoothing=0.1), Tdpo2(label_smoothing=0.1)):
        slopes = []
        for sides in ((one, other), (other, one)):
            given = torch.full((2, 3), 0.2, dtype=torch.float64).requires_grad_()
            _, gradient, out, _ = evaluate(algorithm, [pair(*sides)], [-1.0, -1.0], reference_kl_BT=given)
            slopes.append((gradient, torch.autograd.grad(out.total, given)[0]))
        for first, second in zip(*slopes, strict=True):
            assert torch.allclose(first, second, atol=1e-12)  # chosen first, whichever it is
        assert torch.allclose(slopes[0][0][0], -slopes[0][0][1], atol=1e-12)


def test_a_label_that_is_wrong_for_certain_is_the_other_order():
    """Of both: with p = 0 the gradient stops at the KL of the response that was called rejected."""
    one, other = ITEM.sequences
    for algorithm in (Tdpo1(soft_labels=True), Tdpo2(soft_labels=True)):
        found = []
        for item, rows, given in (
            (pair(one, other, prob=0.0), ROWS, kls()),
            (pair(other, one, prob=1.0), ROWS[::-1], kls(KLS[::-1])),
        ):
            loss, gradient, out, _ = evaluate(algorithm, [item], rows, reference_kl_BT=given)
            order = slice(None) if item.prob == 0.0 else [1, 0]
            found.append((loss, gradient[order], torch.autograd.grad(out.total, given)[0][order]))
        assert found[0][0] == pytest.approx(found[1][0])
        assert torch.allclose(found[0][1], found[1][1])
        assert torch.allclose(found[0][2], found[1][2])


@pytest.mark.parametrize("knobs", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"flip_rate": 0.1}, {"margin_cap": 0.0}])
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Tdpo1(**knobs)


def test_a_missing_kl_is_named():
    assert Tdpo1().needs.reference_kl
    with pytest.raises(ValueError, match=r"outputs\.reference_kl_BT"):
        evaluate(Tdpo1(), [ITEM], ROWS)
