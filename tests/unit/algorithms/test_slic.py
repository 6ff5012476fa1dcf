from __future__ import annotations

import pytest
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence, values
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.slic import Slic

VARIANTS = [{}, {"reference_free": True, "beta": 1.0, "nll_coef": 0.1}]
KNOBS = MARGIN_KNOBS


def at_reference(items):
    return 1.0


def test_value_by_hand():
    loss, gradient, out, _ = evaluate(Slic(), [ITEM], ROWS)
    assert loss == pytest.approx(0.7)
    assert gradient[0, 0].item() == pytest.approx(-0.1)
    assert values(out)["active"] == 1.0


def test_beyond_the_margin_a_pair_teaches_nothing():
    loss, gradient, out, _ = evaluate(Slic(beta=0.5), [ITEM], ROWS)  # z = 1.5
    assert loss == 0
    assert gradient.nan_to_num().abs().max() == 0
    assert values(out)["active"] == 0.0


def test_the_form_with_likelihood_and_without_reference():
    # S_w - S_l = 3, so the hinge is shut; 0.1 of 0.5 nats a token
    assert evaluate(Slic(reference_free=True, beta=1.0, nll_coef=0.1), [ITEM], ROWS)[0] == pytest.approx(0.05)
    close = pair(sequence(1), sequence(1, 50))
    assert evaluate(Slic(reference_free=True, beta=1.0), [close], [-1.0, -1.25])[0] == pytest.approx(0.75)


def test_agrees_with_trl():
    assert_agrees_with_dpo(Slic(beta=0.4), {"hinge": 1.0}, beta=0.4)
