from __future__ import annotations

import math

import pytest
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence
from pydantic import ValidationError
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.exo_pair import ExoPair

VARIANTS = [{}, {"eps": 0.1}]
KNOBS = MARGIN_KNOBS | {"eps": [({}, 0.3)]}


def at_reference(items):
    """KL of (1/2, 1/2) to (0.999, 0.001): -ln 2 - (ln 0.999 + ln 0.001) / 2."""
    return -math.log(2) - 0.5 * (math.log(0.999) + math.log(0.001))


def test_value_by_hand():
    # q = 0.574442517: q ln(q / 0.999) + (1 - q) ln((1 - q) / 0.001) = -0.317870 + 2.576070
    assert evaluate(ExoPair(), [ITEM], ROWS)[0] == pytest.approx(2.258200, abs=2e-6)


def test_is_0_at_the_logit_of_the_label_and_larger_on_both_sides():
    item = pair(sequence(1), sequence(1, 50))
    at = [evaluate(ExoPair(beta=1.0, eps=0.1), [item], [2.1972246 + step, 0.0]) for step in (-0.5, 0.0, 0.5)]
    assert at[1][0] == pytest.approx(0.0, abs=1e-9)
    assert at[1][1].abs().max() < 1e-7
    assert min(at[0][0], at[2][0]) > 1e-3


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_impossible_labels_are_refused(eps):
    with pytest.raises(ValidationError):
        ExoPair(eps=eps)


def test_agrees_with_trl():
    assert_agrees_with_dpo(ExoPair(beta=0.4, eps=0.05), {"exo_pair": 1.0}, beta=0.4, label_smoothing=0.05)
