from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_MINUS, F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, judged, pair, sequence, values
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms._modified import PairFilter
from onlinerl.algorithms.dpo import Dpo
from onlinerl.types import Pair

VARIANTS = [
    {},
    {"soft_labels": True, "label_smoothing": 0.1, "nll_coef": 0.5, "length_norm": True},
    {"pair_weights": "wpo"},
    {"token_weights": "differing", "common_token_weight": 0.25, "length_norm": True, "pair_weights": "dcg"},
    {"nll_coef": 0.3, "nll_target": "reference_answer", "pair_weights": "strength", "strength_thresholds": [0.3, 1.0]},
    {"online_kl": 0.1, "online_kl_samples": 3, "pair_filter": PairFilter(margin=0.1, max_reference_margin=3.0, ches_share=0.1)},
]
KNOBS = MARGIN_KNOBS


def stops_gradients(algorithm):
    """Weights of pairs with `pair_weights: wpo`, and those of samples with `online_kl`."""
    return algorithm.pair_weights == "wpo" or algorithm.online_kl > 0


def at_reference(items):
    return math.log(2)


def test_at_the_reference_the_loss_is_log_2_and_the_slopes_are_half_beta():
    loss, gradient, _, _ = evaluate(Dpo(), [ITEM], [-1.0, -2.0])
    assert loss == pytest.approx(math.log(2), abs=1e-12)
    assert torch.allclose(gradient[0], torch.full((4,), -0.05, dtype=torch.float64))
    assert gradient[1].tolist() == pytest.approx([0.05, 0.05, 0.0, 0.0])


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, F_PLUS),
        ({"label_smoothing": 0.1}, 0.9 * F_PLUS + 0.1 * F_MINUS),
        ({"soft_labels": True}, 0.8 * F_PLUS + 0.2 * F_MINUS),
        # (1 - 0.1) * 0.8 + 0.1 * 0.2 = 0.74
        ({"soft_labels": True, "label_smoothing": 0.1}, 0.74 * F_PLUS + 0.26 * F_MINUS),
        ({"nll_coef": 2.0}, F_PLUS + 2.0 * 0.5),
        # Dbar_w = 0.5 and Dbar_l = -0.5, so z = 0.3 at beta 0.3
        ({"length_norm": True, "beta": 0.3}, F_PLUS),
    ],
)
def test_value_by_hand(knobs, expected):
    assert evaluate(Dpo(**knobs), [ITEM], ROWS)[0] == pytest.approx(expected, rel=1e-7)


def test_slope_is_sigmoid_minus_one():
    _, gradient, _, _ = evaluate(Dpo(beta=0.1), [ITEM], ROWS)
    assert gradient[0, 0].item() == pytest.approx(0.1 * (1 / (1 + math.exp(-0.3)) - 1))


@pytest.mark.parametrize(
    ("knobs", "prob", "optimum"), [({"label_smoothing": 0.1}, 1.0, 2.1972246), ({"soft_labels": True}, 0.9, 2.1972246)]
)
def test_minimum_is_at_the_logit_of_the_label(knobs, prob, optimum):
    item = pair(sequence(1), sequence(1, 50), prob=prob)
    at = [evaluate(Dpo(beta=1.0, **knobs), [item], [optimum + step, 0.0]) for step in (-0.1, 0.0, 0.1)]
    assert at[1][1].abs().max() < 1e-6
    assert at[1][0] < min(at[0][0], at[2][0])


def test_even_odds_at_the_reference_give_no_gradient():
    item = pair(sequence(3), sequence(3, 50), prob=0.5)
    assert evaluate(Dpo(soft_labels=True), [item], [0.0, 0.0])[1].abs().max() == 0


def test_length_norm_at_equal_lengths_is_beta_times_length():
    item = pair(sequence(5, reference_logprobs=-1.0), sequence(5, 50, reference_logprobs=-1.5))
    rows = [-0.7, -1.9]
    assert evaluate(Dpo(beta=0.5, length_norm=True), [item], rows)[0] == pytest.approx(evaluate(Dpo(beta=0.1), [item], rows)[0])


def test_nll_leaves_the_gradient_on_the_rejected_response_alone():
    plain, with_nll = (evaluate(Dpo(nll_coef=c), [ITEM], ROWS)[1] for c in (0.0, 3.0))
    assert torch.equal(plain[1], with_nll[1])
    assert with_nll[0, 0].item() == pytest.approx(plain[0, 0].item() - 3.0 / 4)


@given(st.floats(-30, 30), st.floats(-30, 30))
@settings(max_examples=50, deadline=None)
def test_a_pair_is_ranked_right_iff_its_loss_is_below_that_of_the_reference_gap(shift, reference_gap):
    # S_w - S_l = shift, S_ref_w - S_ref_l = -c with c = reference_gap
    item = pair(sequence(1, reference_logprobs=-reference_gap), sequence(1, 50))
    if abs(shift) > 1e-3:
        loss = evaluate(Dpo(), [item], [shift, 0.0])[0]
        assert (shift > 0) == (loss <= math.log1p(math.exp(-0.1 * reference_gap)))


@given(
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    level=st.floats(-3, -0.1),
    prob=st.floats(0.0, 1.0),
    smoothing=st.floats(0.0, 0.49),
    norm=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_swapping_chosen_and_rejected_flips_the_slope_at_zero_margin(lengths, level, prob, smoothing, norm):
    algorithm = Dpo(soft_labels=True, label_smoothing=smoothing, length_norm=norm)
    one, other = sequence(lengths[0], reference_logprobs=level), sequence(lengths[1], 50, reference_logprobs=level)
    rows = [float(one.reference_logprobs[0]), float(one.reference_logprobs[0])]
    _, forward, _, _ = evaluate(algorithm, [pair(one, other, prob=prob)], rows)
    _, swapped, _, _ = evaluate(algorithm, [pair(other, one, prob=prob)], rows)
    assert torch.allclose(forward, -swapped.flip(0), atol=1e-12)


def test_batch_of_several_pairs_is_their_mean_weighted():
    other = pair(sequence(3), sequence(1, 50), weight=0.5)
    both = evaluate(Dpo(), [ITEM, other], [*ROWS, 0.0, 0.0])[0]
    assert both == pytest.approx((F_PLUS + 0.5 * math.log(2)) / 2)


def test_metrics_by_hand():
    metrics = values(evaluate(Dpo(), [ITEM], ROWS)[2])
    expected = {
        "chosen_log_ratio": 2.0,
        "rejected_log_ratio": -1.0,
        "margin": 3.0,
        "z": 0.3,
        "accuracy": 1.0,
        "ranking_accuracy": 1.0,  # S_w = -2 > S_l = -5
        "ranking_accuracy_per_token": 1.0,
        "chosen_fell": 0.0,
        "chosen_length": 4.0,
        "rejected_length": 2.0,
        "length_ratio": 2.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_items_are_the_pairs_without_identical_responses_which_are_counted():
    group = judged([2, 3, 3], scores=(0.0, 1.0, 2.0))
    rollouts = group.group.rollouts
    twin = type(rollouts[0])(**{f: getattr(rollouts[1], f) for f in rollouts[1].__slots__})
    group = type(group)(
        group=type(group.group)(prompt=group.group.prompt, rollouts=(*rollouts[:2], twin)), verdict=group.verdict
    )
    items, dropped = Dpo().items(group, [Pair(chosen=2, rejected=0, prob=0.7), Pair(chosen=2, rejected=1, prob=0.9)])
    assert [(item.prob, [s.score for s in item.sequences]) for item in items] == [(0.7, [2.0, 0.0])]
    assert dropped == {"identical": 1}
    assert items[0].sequences[0].behavior_logprobs.tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("knobs", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"beta": 0.0}, {"nll_coef": -1.0}])
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Dpo(**knobs)


def test_a_missing_reference_is_named():
    item = pair(sequence(1).with_(reference_logprobs=None), sequence(1, 50))
    with pytest.raises(ValueError, match="reference_logprobs_BT"):
        evaluate(Dpo(), [item], [0.0, 0.0])


@pytest.mark.parametrize(
    ("knobs", "theirs", "count"),
    [
        ({"beta": 0.3}, {"sigmoid": 1.0}, 3),
        ({"beta": 2.0, "length_norm": True}, {"sigmoid_norm": 1.0}, 3),
        # TRL has label smoothing only in AOT, which for a single pair is DPO; and its NLL averages over the tokens of the batch
        ({"beta": 0.3, "label_smoothing": 0.2}, {"aot": 1.0}, 1),
        ({"beta": 0.3, "nll_coef": 0.7}, {"sigmoid": 1.0, "sft": 0.7}, 1),
        ({"beta": 0.3, "flip_rate": 0.2, "margin_cap": 100.0}, {"robust": 1.0}, 3),
    ],
)
def test_agrees_with_trl(knobs, theirs, count):
    smoothing = knobs.get("label_smoothing", knobs.get("flip_rate", 0.0))
    assert_agrees_with_dpo(Dpo(**knobs), theirs, count, beta=knobs["beta"], label_smoothing=smoothing)
