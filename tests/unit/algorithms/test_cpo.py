from __future__ import annotations

import numpy as np
import pytest
from algorithm_batches import F_PLUS, ITEM, MARGIN_KNOBS, ROWS, WITH_REFERENCE, evaluate, pair
from trl_losses import assert_agrees, cpo_loss, whole_cpo_loss

from onlinerl.algorithms.cpo import Cpo
from onlinerl.algorithms.dpo import Dpo

VARIANTS = [{}, {"nll_coef": 0.0, "beta": 0.3}]
KNOBS = (
    MARGIN_KNOBS
    | WITH_REFERENCE
    | {
        "reference_free": [({}, False)],
        "nll_norm": [({}, "sum"), ({}, "batch_tokens")],
        "dpop_lambda": [({"reference_free": False}, 2.0)],
    }
)


def at_reference(items):
    sums = [[float(s.behavior_logprobs.sum()) for s in item.sequences] for item in items]
    nll = [-float(item.sequences[0].behavior_logprobs.mean()) for item in items]
    return float(np.mean([np.log1p(np.exp(-0.1 * (won - lost))) + n for (won, lost), n in zip(sums, nll, strict=True)]))


def test_value_by_hand():
    # S_w - S_l = -2 + 5 = 3, so z = 0.3; the chosen response has 0.5 nats a token
    assert evaluate(Cpo(), [ITEM], ROWS)[0] == pytest.approx(F_PLUS + 0.5, rel=1e-7)


def test_without_the_likelihood_it_is_dpo_with_a_reference_of_zero():
    zero = pair(*(s.with_(reference_logprobs=0 * s.reference_logprobs) for s in ITEM.sequences))
    assert evaluate(Cpo(nll_coef=0.0), [ITEM], ROWS)[0] == evaluate(Dpo(), [zero], ROWS)[0]


def test_of_one_pair_agrees_with_trl():
    """TRL's likelihood is the mean over the tokens of the batch."""
    assert_agrees(Cpo(), lambda logprobs, _, mask: whole_cpo_loss(logprobs, mask, beta=0.1, nll_coef=1.0), 1)


def test_without_likelihood_agrees_with_trl():
    assert_agrees(Cpo(nll_coef=0.0), lambda logprobs, _, mask: cpo_loss(logprobs, mask, beta=0.1))
