from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, ROWS, evaluate
from pydantic import ValidationError
from test_tdpo1 import KNOBS as KNOBS_1
from test_tdpo1 import kls

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.tdpo2 import Tdpo2

VARIANTS = [{}, {"alpha": 0.0}, {"alpha": 1.0, "label_smoothing": 0.1, "nll_coef": 0.5}]
KNOBS = KNOBS_1 | {"alpha": [({}, 0.0), ({}, 1.0)]}


def at_reference(items):
    return math.log(2)


def stops_gradients(algorithm):
    """The KL of the preferred response."""
    return algorithm.alpha > 0


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, 0.571573),  # z = 0.1 (3 + 0.5 (0.6 - 1.4)) = 0.26: ln(1 + exp(-0.26))
        ({"alpha": 1.0}, 0.589185),  # the value of TDPO1
        ({"label_smoothing": 0.1}, 0.9 * 0.571573 + 0.1 * 0.831573),  # ln(1 + exp(0.26))
    ],
)
def test_value_by_hand(knobs, expected):
    assert evaluate(Tdpo2(**knobs), [ITEM], ROWS, reference_kl_BT=kls())[0] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("knobs", "chosen", "rejected"),
    [
        ({}, 0.0, 0.0217682),  # 0.1 * 0.5 * sigmoid(-0.26) = 0.05 * 0.435364; nothing through the chosen one's
        # 0.9 of it; and 0.1 of 0.05 * sigmoid(0.26) = 0.05 * 0.564636 in the other order
        ({"label_smoothing": 0.1}, 0.00282318, 0.0195914),
    ],
)
def test_slopes_by_hand(knobs, chosen, rejected):
    given = kls()
    out = evaluate(Tdpo2(**knobs), [ITEM], ROWS, reference_kl_BT=given)[2]
    (slopes,) = torch.autograd.grad(out.total, given)
    assert slopes[0].tolist() == pytest.approx([chosen] * 4, rel=1e-5)
    assert slopes[1].tolist() == pytest.approx([rejected] * 2 + [0.0] * 2, rel=1e-5)


@pytest.mark.parametrize("knobs", [{}, {"soft_labels": True, "label_smoothing": 0.1, "nll_coef": 0.5, "pair_weights": "wpo"}])
def test_alpha_0_is_dpo(knobs):
    collisions = torch.tensor([[-0.6] * 4, [-2.0] * 4], dtype=torch.float64)
    one, other = (
        evaluate(algorithm, [ITEM], ROWS, reference_kl_BT=kls(), collision_BT=collisions)
        for algorithm in (Tdpo2(alpha=0.0, **knobs), Dpo(**knobs))
    )
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    assert torch.allclose(one[1], other[1], rtol=1e-12)
    if not knobs:
        assert one[0] == pytest.approx(F_PLUS)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValidationError):
        Tdpo2(alpha=-0.1)
