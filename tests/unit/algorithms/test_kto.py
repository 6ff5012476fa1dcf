from __future__ import annotations

import pytest
import torch
from algorithm_batches import evaluate, items_of, judged, sequence, single, spread, values
from trl_losses import kto_loss

from onlinerl.algorithms.kto import Kto

VARIANTS = [
    {},
    {"threshold": 0.0, "desirable_weight": 1.5, "undesirable_weight": 0.5, "nll_coef": 0.3},
    {"response_weights": "wpo", "nll_coef": 0.3},
]
KNOBS = {
    "beta": [({}, 0.3)],
    "desirable_weight": [({}, 2.0)],
    "undesirable_weight": [({}, 2.0)],
    "threshold": [({}, 0.0), ({"threshold": 0.0}, 1.0)],
    "nll_coef": [({}, 0.5)],
    "response_weights": [({}, "wpo")],
}


def at_reference(items):
    return 0.5


def stops_gradients(algorithm):
    """z."""
    return True


GOOD = single(sequence(4, reference_logprobs=-1.0, win_rate=0.9, score=1.0))
BAD = single(sequence(2, 50, reference_logprobs=-2.0, win_rate=0.1, score=-1.0))


@pytest.mark.parametrize("knobs", [{}, {"threshold": 0.5}])
def test_value_by_hand(knobs):
    # D = 2 and -1, so z = 0.5: 1 - sigmoid(0.1 * 1.5) = 0.462570 of either
    loss, _, out, _ = evaluate(Kto(**knobs), [GOOD, BAD], [-0.5, -2.5])
    assert loss == pytest.approx(0.462570, abs=1e-6)
    assert values(out) == pytest.approx({"desirable": 0.5, "desirable_log_ratio": 2.0, "undesirable_log_ratio": -1.0})


@pytest.mark.parametrize("ratio", [-3.0, 3.0, 300.0])
def test_a_response_of_weight_zero_is_not_part_of_the_mean(ratio):
    """D = 2 and -1 count, so z = 0.5 as without the third one, and that one has no gradient."""
    nobody = single(sequence(1, 90, reference_logprobs=-1.0, win_rate=0.9), weight=0.0)
    alone = evaluate(Kto(), [GOOD, BAD], [-0.5, -2.5])
    beside = evaluate(Kto(), [GOOD, BAD, nobody], [-0.5, -2.5, ratio - 1.0])
    assert beside[0] * 3 == pytest.approx(alone[0] * 2)
    assert (beside[1][:2] * 3).flatten().tolist() == pytest.approx((alone[1] * 2).flatten().tolist())
    assert beside[1][2].abs().max() == 0.0


def test_the_likelihood_of_desirable_responses_is_a_term():
    plain, with_nll = (evaluate(Kto(nll_coef=c), [GOOD, BAD], [-0.5, -2.5]) for c in (0.0, 2.0))
    assert with_nll[0] - plain[0] == pytest.approx(2.0 * 0.5 / 2)  # over two responses
    assert (with_nll[1] - plain[1])[0].tolist() == pytest.approx([-2.0 / 4 / 2] * 4)
    assert torch.equal(with_nll[1][1, :2], plain[1][1, :2])
    assert values(with_nll[2])["chosen_nll"] == pytest.approx(0.5)
    assert Kto(nll_coef=2.0).loss_at_reference is None


def test_a_response_that_is_far_from_the_policy_counts_less():
    """0.3 nats a token more probable than the policy's own, which is cut off at 1, and 1 nat less: exp(-1). So do their likelihoods."""
    collision_BT = torch.tensor([[-0.8] * 4, [-1.5] * 4], dtype=torch.float64)
    plain, weighed, with_nll = (
        evaluate(Kto(**knobs), [GOOD, BAD], [-0.5, -2.5], collision_BT=collision_BT)
        for knobs in ({}, {"response_weights": "wpo"}, {"response_weights": "wpo", "nll_coef": 2.0})
    )
    assert weighed[0] == pytest.approx(0.462570 * (1.0 + 0.367879) / 2, abs=1e-6)
    assert torch.equal(weighed[1][0], plain[1][0])
    assert weighed[1][1, :2].tolist() == pytest.approx((0.367879 * plain[1][1, :2]).tolist(), abs=1e-7)
    assert with_nll[0] - weighed[0] == pytest.approx(2.0 * 0.5 / 2)
    assert (Kto(response_weights="wpo").needs.collision, Kto().needs.collision) == (True, False)
    assert Kto(response_weights="wpo").loss_at_reference is None
    with pytest.raises(ValueError, match="collision_BT"):
        evaluate(Kto(response_weights="wpo"), [GOOD, BAD], [-0.5, -2.5])


def test_the_likelihood_of_a_response_that_is_far_from_the_policy_counts_less_too():
    """Both are desirable: 0.5 and 2.5 nats a token, the second of which counts exp(-1)."""
    collision_BT = torch.tensor([[-0.8] * 4, [-1.5] * 4], dtype=torch.float64)
    items = [GOOD, single(sequence(2, 50, reference_logprobs=-2.0, win_rate=0.9))]
    losses = [
        evaluate(Kto(response_weights="wpo", nll_coef=c), items, [-0.5, -2.5], collision_BT=collision_BT)[0] for c in (0.0, 1.0)
    ]
    assert losses[1] - losses[0] == pytest.approx((0.5 + 0.367879 * 2.5) / 2, abs=1e-6)


def test_a_negative_mean_counts_as_no_kl():
    # D = -2 and -3: sigmoid(0.2) = 0.549834 and sigmoid(-0.3) = 0.425557
    loss, _, _, _ = evaluate(Kto(), [GOOD, BAD], [-1.5, -3.5])
    assert loss == pytest.approx((0.549834 + 0.425557) / 2, abs=1e-6)


def test_weights_of_the_classes():
    loss, _, _, _ = evaluate(Kto(desirable_weight=2.0, undesirable_weight=0.5), [GOOD, BAD], [-0.5, -2.5])
    assert loss == pytest.approx(0.462570 * 1.25, abs=1e-6)


def test_at_the_baseline_the_classes_pull_in_opposite_directions_and_the_baseline_gets_no_gradient():
    # D = 1 and 1, so z = 1: slopes -beta / 4 and +beta / 4, over two responses
    loss, gradient, _, _ = evaluate(Kto(), [GOOD, BAD], [-0.75, -1.5])
    assert loss == pytest.approx(0.5)
    assert gradient[:, 0].tolist() == pytest.approx([-0.1 / 8, 0.1 / 8])


def test_a_step_of_one_class_is_legal():
    loss, gradient, _, _ = evaluate(Kto(), [GOOD], [-0.5])
    assert loss == pytest.approx(0.5)
    assert gradient[0, 0] < 0


def test_without_a_threshold_responses_that_win_half_are_left_out_and_counted():
    items, dropped = Kto().items(judged([1, 2, 3], scores=(0.0, 1.0, 2.0)), [])
    assert [item.sequences[0].score for item in items] == [0.0, 2.0]
    assert dropped == {"tie": 1}
    assert len(items_of(Kto(threshold=1.0), judged([1, 2, 3], scores=(0.0, 1.0, 2.0)))) == 3


def test_one_response_is_enough_with_a_threshold():
    assert (Kto().needs.min_samples, Kto(threshold=0.0).needs.min_samples) == (2, 1)
    assert (Kto().needs.preferences, Kto(threshold=0.0).needs.preferences) == (True, False)


@pytest.mark.parametrize("far", [0.0, 1.0])
def test_with_z_of_the_same_responses_agrees_with_trl(far):
    """Where TRL is given the same responses to estimate the KL from. With `far` its mean is negative, which counts as none."""
    torch.manual_seed(0)
    lengths, weights = [4, 1, 3, 2, 6], {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    items = [
        single(sequence(n, 10 * i, reference_logprobs=far - 2 * torch.rand(n), win_rate=0.9 * (i < 3)))
        for i, n in enumerate(lengths)
    ]
    rows = [-torch.rand(n, dtype=torch.float64) for n in lengths]
    loss, gradient, _, batch = evaluate(Kto(**weights), items, rows)
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = kto_loss(logprobs, batch.reference_logprobs_BT.double(), batch.win_rates_B > 0.5, batch.mask_BT, **weights)
    assert loss == pytest.approx(expected.item(), rel=1e-7)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], rtol=1e-6, atol=1e-8)
