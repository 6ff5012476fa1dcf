from __future__ import annotations

import numpy as np
import pytest
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, WITH_REFERENCE, evaluate, pair, sequence
from pydantic import ValidationError
from trl_losses import assert_agrees, cpo_loss

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.simpo import Simpo

VARIANTS = [{}, {"beta": 2.5, "gamma_beta_ratio": 0.1, "label_smoothing": 0.1}]
KNOBS = (
    MARGIN_KNOBS
    | WITH_REFERENCE
    | {
        "reference_free": [({}, False)],
        "length_norm": [({}, False)],
        "dpop_lambda": [({"reference_free": False}, 2.0)],
        "margin_cap": [({"gamma_beta_ratio": 0.0}, 0.01)],
        "flip_rate": [({"margin_cap": 10.0}, 0.2)],
    }
)


def at_reference(items):
    means = [[float(s.behavior_logprobs.mean()) for s in item.sequences] for item in items]
    return float(np.mean([np.log1p(np.exp(-2.0 * (won - lost - 0.5))) for won, lost in means]))


def test_value_by_hand():
    # -0.5 - -2.5 = 2 per token, so z = 2 (2 - 0.5) = 3, and log(1 + exp(-3))
    assert evaluate(Simpo(), [ITEM], ROWS)[0] == pytest.approx(0.048587352, rel=1e-6)


def test_reads_no_reference():
    assert not Simpo().needs.reference
    assert Simpo().reference == "none"
    bare = pair(*(s.with_(reference_logprobs=None) for s in ITEM.sequences))
    assert evaluate(Simpo(), [bare], ROWS)[0] == evaluate(Simpo(), [ITEM], ROWS)[0]


def test_without_margin_and_at_equal_lengths_it_is_dpo_with_a_reference_of_zero():
    item = pair(sequence(4), sequence(4, 50))
    rows = [-0.5, -1.5]
    assert evaluate(Simpo(gamma_beta_ratio=0.0), [item], rows)[0] == pytest.approx(evaluate(Dpo(beta=0.5), [item], rows)[0])


def test_twice_as_long_at_the_same_log_prob_per_token_is_the_same():
    short, long = (pair(sequence(2 * k), sequence(3 * k, 50)) for k in (1, 2))
    assert evaluate(Simpo(), [short], ROWS)[0] == pytest.approx(evaluate(Simpo(), [long], ROWS)[0])


def test_what_holds_on_to_a_reference_is_refused():
    with pytest.raises(ValidationError, match="reference_free"):
        Simpo(dpop_lambda=1.0)


def test_agrees_with_trl():
    assert_agrees(Simpo(), lambda logprobs, _, mask: cpo_loss(logprobs, mask, beta=2.0, gamma=1.0))
