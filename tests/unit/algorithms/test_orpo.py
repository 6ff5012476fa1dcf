from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, MODIFIER_KNOBS, ROWS, evaluate, judged, pair, sequence
from trl_losses import assert_agrees, odds_ratio_loss

from onlinerl.algorithms._modified import PairFilter
from onlinerl.algorithms.orpo import Orpo
from onlinerl.types import Pair

VARIANTS = [{}, {"lam": 1.0, "nll_coef": 0.0}, {"nll_target": "reference_answer", "soft_labels": True}, {"nll_on": "sequence"}]
KNOBS = MODIFIER_KNOBS | {
    "lam": [({}, 0.5)],
    **{knob: MARGIN_KNOBS[knob] for knob in ("soft_labels", "label_smoothing", "margin_cap", "flip_rate")},
    "nll_on": [({}, "sequence")],
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


@pytest.mark.parametrize(
    ("knobs", "text", "nats"),
    [
        ({}, (2, 10, 11), 3.0 / 3),
        ({"nll_norm": "sum"}, (2, 10, 11), 3.0),
        ({"nll_target": "reference_answer"}, (2, 90, 91, 0), 4.0 / 4),
    ],
)
def test_the_likelihood_of_the_prompt_by_hand(knobs, text, nats):
    """The prompt is (1, 2), the chosen response (10, 11): of three tokens the likelihood is, 1 nat each; the answer (90, 91, 0) gives four."""
    with_prompt, group = Orpo(nll_on="sequence", **knobs), judged([2, 3], scores=(1.0, 0.0))
    (item,), _ = with_prompt.items(group, [Pair(chosen=0, rejected=1, prob=1.0)])
    whole = item.sequences[-1]
    assert (whole.prompt_ids, whole.response_ids, item.nll) == ((1,), text, len(item.sequences) - 1)
    rows = [-0.5, -2.5, *([-9.0] if knobs.get("nll_target") else []), -1.0]
    loss, gradient, _, _ = evaluate(with_prompt, [item], rows)
    assert loss == pytest.approx(nats + 0.1 * 0.056382, abs=1e-6)
    per_token = -1.0 if knobs.get("nll_norm") == "sum" else -1.0 / len(text)
    assert gradient[-1][: len(text)].tolist() == pytest.approx([per_token] * len(text))
    odds = evaluate(Orpo(nll_coef=0.0), [pair(*item.sequences[:2])], rows[:2])[1]
    assert gradient[0, :2].tolist() == pytest.approx(odds[0, :2].tolist()), "the response itself has the odds' gradient only"


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
