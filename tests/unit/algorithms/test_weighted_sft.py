from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, finite_differences, judged, response_gradients, trained
from pydantic import ValidationError

from onlinerl.algorithms.raft import Raft
from onlinerl.algorithms.reinforce_scalar import ReinforceScalar
from onlinerl.algorithms.weighted_sft import WeightedSft
from onlinerl.ops.batching import step_units

VARIANTS = [{}, {"threshold": 0.0, "per_sequence": True}]
KNOBS = {
    "beta": [({}, 0.5)],
    "threshold": [({}, 0.0)],
    "low_weight": [({"threshold": 0.0}, 0.5)],
    "per_sequence": [({}, True)],
}
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]
GROUP = judged([3, 1, 2], scores=(1.0, -0.5, 0.25))


def at_reference(items):
    rows = [(item.weight, item.sequences[0].behavior_logprobs) for item in items]
    return -sum(w * row.sum() for w, row in rows) / sum(w * len(row) for w, row in rows)


def weights(algorithm: WeightedSft, *groups) -> list[float]:
    return [item.weight for item in trained(algorithm, groups)]


def test_value_by_hand():
    """Scores log 3 and 0 of 2 tokens and 1: weights 1 and 1/3, which stand for 2 and 1/3 tokens, or for 1 and 1/3 responses."""
    group, rows = judged([2, 1], scores=(math.log(3.0), 0.0)), [[-1.0, -3.0], [-0.5]]
    loss, gradient, _, _ = evaluate(WeightedSft(), trained(WeightedSft(), [group]), rows)
    assert loss == pytest.approx((4.0 + 0.5 / 3) / (7 / 3))
    assert gradient.tolist() == pytest.approx(np.array([[-3 / 7, -3 / 7], [-1 / 7, 0.0]]))
    by_response = WeightedSft(per_sequence=True)
    assert evaluate(by_response, trained(by_response, [group]), rows)[0] == pytest.approx((2.0 + 0.5 / 3) / (4 / 3))


def test_weights_by_hand():
    group = judged([2, 1], scores=(math.log(3.0), 0.0))
    assert weights(WeightedSft(), group) == pytest.approx([1.0, 1 / 3])
    assert weights(WeightedSft(beta=0.5), group) == pytest.approx([1.0, 1 / 9])
    assert weights(WeightedSft(threshold=1.0), group) == pytest.approx([1.0, 0.1])
    assert weights(WeightedSft(threshold=1.0, low_weight=0.0), group) == [1.0, 0.0]
    assert weights(WeightedSft(), judged([1, 1], scores=(5000.0, 0.0))) == [1.0, 0.0]  # no overflow
    assert weights(WeightedSft(), judged([1, 1], scores=(70.0, 0.0))) == [1.0, 0.0]  # e^-70, which float32 has badly
    assert [item.units for item in trained(WeightedSft(), [group])] == pytest.approx([2.0, 1 / 3])
    assert [item.units for item in trained(WeightedSft(per_sequence=True), [group])] == pytest.approx([1.0, 1 / 3])
    assert list(WeightedSft().prepare([])) == []


def test_each_step_is_divided_by_its_own_weights():
    """Two steps of an iteration, one of the good response and one of the bad ones: C-RLFT's sum over a step, not over the iteration."""
    algorithm = WeightedSft(threshold=0.5)  # weights 1, 0.1 and 0.1
    good, *bad = trained(algorithm, [GROUP])
    assert evaluate(algorithm, [good], LOGPROBS[:1])[0] == pytest.approx(3.5 / 3)
    assert evaluate(algorithm, bad, LOGPROBS[1:])[0] == pytest.approx((0.3 + 1.7) / 3)
    assert step_units(bad, "token") == pytest.approx(0.3)


def test_a_step_without_weight_teaches_nothing():
    algorithm = WeightedSft(threshold=9.0, low_weight=0.0)
    items = trained(algorithm, [GROUP])
    assert (step_units(items, "token"), [item.weight for item in items]) == (1.0, [0.0] * 3)


def test_the_loss_is_the_weighted_sum_over_the_sum_of_weights():
    algorithm = WeightedSft()
    loss, _, _, _ = evaluate(algorithm, trained(algorithm, [GROUP]), LOGPROBS)
    raw = np.exp([1.0, -0.5, 0.25])
    nll, tokens = np.array([3.5, 0.3, 1.7]), np.array([3, 1, 2])
    assert loss == pytest.approx(raw @ nll / (raw @ tokens), rel=1e-6)


def test_a_constant_for_all_scores_changes_nothing():
    moved = judged([3, 1, 2], scores=(8.0, 6.5, 7.25))
    assert weights(WeightedSft(), moved) == pytest.approx(weights(WeightedSft(), GROUP))


def test_with_two_classes_the_gradient_is_that_of_reinforce_on_the_weights():
    ours = WeightedSft(threshold=0.5, per_sequence=True)
    plain = ReinforceScalar(baseline="none", agg="seq_mean_token_mean")
    rows = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS}
    theirs = trained(plain, [judged([3, 1, 2], scores=(1.0, 0.1, 0.1))], **rows)
    expected = [3 / 1.2 * slope for slope in response_gradients(plain, theirs, LOGPROBS)]
    assert response_gradients(ours, trained(ours, [GROUP]), LOGPROBS) == pytest.approx(expected)


def test_a_small_beta_is_raft_with_the_best_of_all():
    ours, theirs = WeightedSft(beta=0.01, per_sequence=True), Raft()
    got = response_gradients(ours, trained(ours, [GROUP]), LOGPROBS)
    assert got == pytest.approx(response_gradients(theirs, trained(theirs, [GROUP]), LOGPROBS), abs=1e-9)


def test_a_weight_of_a_class_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="there are no classes"):
        WeightedSft(low_weight=0.5)
    assert WeightedSft().needs.min_samples == 1


def test_gradient_by_finite_differences():
    algorithm = WeightedSft()
    items = trained(algorithm, [GROUP])
    _, gradient, _, _ = evaluate(algorithm, items, LOGPROBS)
    assert torch.allclose(gradient, finite_differences(algorithm, items, LOGPROBS), atol=1e-7)
