from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, MODIFIER_KNOBS, ROWS, evaluate, pair, sequence
from trl_losses import assert_agrees, odds_ratio_loss

from onlinerl.algorithms._modified import PairFilter
from onlinerl.algorithms.orpo import Orpo

VARIANTS = [{}, {"lam": 1.0, "nll_coef": 0.0}, {"nll_target": "reference_answer", "soft_labels": True}]
KNOBS = MODIFIER_KNOBS | {
    "lam": [({}, 0.5)],
    **{knob: MARGIN_KNOBS[knob] for knob in ("soft_labels", "label_smoothing", "margin_cap", "flip_rate")},
    "nll_norm": [({}, "sum"), ({}, "batch_tokens")],
    "pair_filter": [({}, PairFilter(margin=0.8)), ({}, PairFilter(ches_share=0.3))],
    # Without a reference they are refused (test_modified.py).
    "online_kl": [],
    "online_kl_samples": [],
}


def at_reference(items):
    def odds(sequence):
        mean = float(sequence.behavior_logprobs.mean())
        return mean - math.log(1 - math.exp(mean))

    gaps = [odds(item.sequences[0]) - odds(item.sequences[1]) for item in items]
    nll = [-float(item.sequences[0].behavior_logprobs.mean()) for item in items]
    return float(np.mean([n + 0.1 * np.log1p(np.exp(-gap)) for n, gap in zip(nll, gaps, strict=True)]))


def test_value_by_hand():
    # o_w = -0.5 - ln(1 - e^-0.5) = 0.432752, o_l = -2.5 - ln(1 - e^-2.5) = -2.414350; f(2.847102) = 0.056382
    assert evaluate(Orpo(), [ITEM], ROWS)[0] == pytest.approx(0.5 + 0.1 * 0.056382, abs=1e-6)


@pytest.mark.parametrize(
    ("knobs", "right"),
    [
        ({"label_smoothing": 0.1}, 0.9),
        ({"soft_labels": True}, 0.8),
        ({"flip_rate": 0.1, "margin_cap": 9.0}, 0.9 / 0.8),
    ],
)
def test_labels_that_may_be_wrong_by_hand(knobs, right):
    expected = 0.5 + 0.1 * (right * 0.056382 + (1 - right) * (0.056382 + 2.847102))  # f(-z) = f(z) + z
    assert evaluate(Orpo(**knobs), [ITEM], ROWS)[0] == pytest.approx(expected, abs=1e-6)


def test_at_equal_log_probs_per_token_the_odds_say_log_2():
    item = pair(sequence(4), sequence(2, 50))
    assert evaluate(Orpo(lam=1.0, nll_coef=0.0), [item], [-0.7, -0.7])[0] == pytest.approx(math.log(2))


def test_a_response_that_is_certain_has_finite_odds():
    loss, gradient, _, _ = evaluate(Orpo(), [pair(sequence(1), sequence(1, 50))], [0.0, -1e-9])
    assert math.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_reads_no_reference():
    assert not Orpo().needs.reference
    assert Orpo().reference == "none"


def test_without_likelihood_agrees_with_trl():
    assert_agrees(Orpo(nll_coef=0.0, lam=0.7), lambda logprobs, _, mask: odds_ratio_loss(logprobs, mask, lam=0.7))
