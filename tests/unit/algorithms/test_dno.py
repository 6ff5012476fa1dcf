from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import PAIR_KNOBS, evaluate, items_of, judged, pair, sequence, values

from onlinerl.algorithms.dno import Dno
from onlinerl.algorithms.dpo import Dpo
from onlinerl.types import Pair

VARIANTS = [{}, {"reward_scale": 5.0}]
KNOBS = PAIR_KNOBS | {"eta": [({}, 0.3)], "reward_scale": [({}, 4.0)]}
PAIRS = [Pair(chosen=2, rejected=0, prob=0.9), Pair(chosen=2, rejected=1, prob=0.8), Pair(chosen=1, rejected=0, prob=0.7)]


def at_reference(items):
    return math.log(2)


def item(rate_1: float, rate_2: float, **changes):
    return pair(
        sequence(2, reference_logprobs=-1.0, win_rate=rate_1),
        sequence(4, 50, reference_logprobs=-1.0, win_rate=rate_2),
        **changes,
    )


@pytest.mark.parametrize(("rate_1", "rate_2"), [(0.9, 0.1), (0.5, 0.5), (0.2, 0.7)])
def test_the_loss_at_the_reference_is_log_2_for_every_target(rate_1, rate_2):
    loss, gradient, _, _ = evaluate(Dno(), [item(rate_1, rate_2)], [-1.0, -1.0])
    assert loss == pytest.approx(0.693147, abs=1e-6)
    q = 1 / (1 + math.exp(rate_2 - rate_1))
    assert gradient[0, 0].item() == pytest.approx(0.1 * (0.5 - q), abs=1e-8)
    assert gradient[1, 0].item() == pytest.approx(-0.1 * (0.5 - q), abs=1e-8)


def test_value_by_hand():
    # D_1 = 1 and D_2 = -2, so z = 0.3; q = sigmoid(0.8) = 0.68997448
    expected = 0.68997448 * 0.554355244 + 0.31002552 * 0.854355244
    assert evaluate(Dno(), [item(0.9, 0.1)], [-0.5, -1.5])[0] == pytest.approx(expected, rel=1e-6)


def test_optimum_is_the_difference_of_win_rates_over_eta():
    # (0.75 - 0.25) * 4 / 0.5 = 4 nats
    _, gradient, _, _ = evaluate(Dno(eta=0.5, reward_scale=4.0), [item(0.75, 0.25)], [1.0, -1.0])
    assert gradient.abs().max() < 1e-6


def test_equals_dpo_with_soft_labels_q():
    q = 1 / (1 + math.exp(-0.8))
    ours = evaluate(Dno(eta=0.2), [item(0.9, 0.1)], [-0.4, -1.3])
    theirs = evaluate(Dpo(beta=0.2, soft_labels=True), [item(0.9, 0.1, prob=q)], [-0.4, -1.3])
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert torch.allclose(ours[1], theirs[1], atol=1e-7)


def test_orientation_does_not_matter_but_win_rates_do():
    one, other = item(0.9, 0.1).sequences
    _, forward, _, _ = evaluate(Dno(), [pair(one, other)], [-1.0, -1.0])
    _, turned, _, _ = evaluate(Dno(), [pair(other, one)], [-1.0, -1.0])
    assert torch.allclose(forward, turned.flip(0), atol=1e-9)  # the label belongs to the responses, not to their order
    _, swapped, _, _ = evaluate(Dno(), [item(0.1, 0.9)], [-1.0, -1.0])
    assert torch.allclose(forward, -swapped, atol=1e-9)


def test_metrics_report_the_target():
    assert values(evaluate(Dno(), [item(0.9, 0.1)], [-1.0, -1.0])[2])["target_prob"] == pytest.approx(0.68997448)


def test_win_rates_come_from_the_group():
    items = items_of(Dno(), judged([1, 2, 3], scores=(0.0, 0.0, 100.0)), PAIRS[:1])
    assert [s.win_rate for s in items[0].sequences] == pytest.approx([2.5 / 3, 1.0 / 3])
