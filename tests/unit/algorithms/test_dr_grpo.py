from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import (
    CLIP_KNOBS,
    IMPORTANCE_KNOBS,
    evaluate,
    finite_differences,
    judged,
    response_gradients,
    sequence,
    single,
    spread,
    trained,
    values,
)
from trl_losses import grpo_loss

from onlinerl.algorithms.dr_grpo import DrGrpo
from onlinerl.algorithms.reinforce_scalar import ReinforceScalar
from onlinerl.types import Plan

VARIANTS = [{"max_length": 8}, {"kl_coef": 0.04, "clip_range_high": 0.28, "importance_sampling_cap": None}]
KNOBS = CLIP_KNOBS | IMPORTANCE_KNOBS | {"max_length": [({}, 16)], "kl_coef": [({}, 0.5)]}
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]


def at_reference(items):
    return -np.mean([item.sequences[0].advantages.sum() for item in items]) / 8


def test_value_by_hand():
    # Ratios 1.5 (clipped to 1.2) and 1 with A = 1; ratio 0.9 with A = -2: token losses -1.2, -1 and 1.8, over 2 responses and 4 tokens
    items = [
        single(
            sequence(2, old_logprobs=[-1.0 - np.log(1.5), -1.0], behavior_logprobs=[-1.0 - np.log(1.5), -1.0], advantages=1.0)
        ),
        single(sequence(1, old_logprobs=-1.0 - np.log(0.9), behavior_logprobs=-1.0 - np.log(0.9), advantages=-2.0)),
    ]
    assert evaluate(DrGrpo(max_length=4), items, [-1.0, -1.0])[0] == pytest.approx(-0.4 / 2 / 4, rel=1e-5)


def test_advantages_by_hand():
    items = trained(DrGrpo(), [judged([2, 1, 1, 3], scores=(1.0, 0.0, 0.0, 0.0))])
    assert [item.sequences[0].advantages.tolist() for item in items] == [[0.75] * 2, [-0.25], [-0.25], [-0.25] * 3]
    assert [i.sequences[0].advantages.tolist() for i in trained(DrGrpo(), [judged([1, 2], scores=(0.1, 0.1))])] == [
        [0.0],
        [0.0, 0.0],
    ]


def test_the_gradient_of_a_token_does_not_depend_on_the_length_of_its_response():
    for length in (1, 4, 9):
        item = single(sequence(length, old_logprobs=-1.0, behavior_logprobs=-1.0, advantages=1.5))
        assert evaluate(DrGrpo(max_length=10), [item], [-1.0])[1][0].tolist() == pytest.approx([-0.15] * length)


def test_on_policy_it_is_reinforce_with_the_group_mean_over_the_constant():
    group = judged([3, 1, 2], scores=(1.0, -0.5, 0.25))
    rows = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS}
    ours, plain = DrGrpo(max_length=16), ReinforceScalar(baseline="group_mean")
    got = response_gradients(ours, trained(ours, [group], **rows), LOGPROBS)
    expected = response_gradients(plain, trained(plain, [group], **rows), LOGPROBS)
    assert got == pytest.approx([slope / 16 for slope in expected], rel=1e-5)
    assert got[0] == pytest.approx(-0.75 / 3 / 16)  # A = 1 - 0.25


def test_gradient_by_finite_differences():
    rows = {
        "behavior_logprobs": LOGPROBS,
        "old_logprobs": [[-1.3, -0.4, -2.2], [-0.5], [-1.4, -0.9]],
        "reference_logprobs": LOGPROBS,
    }
    algorithm = DrGrpo(max_length=8, kl_coef=0.3)
    items = trained(algorithm, [judged([3, 1, 2], scores=(1.0, -0.5, 0.25))], **rows)
    at = [[-1.1, -0.5, -1.0], [-0.2], [-1.3, -0.3]]
    _, gradient, out, _ = evaluate(algorithm, items, at)
    assert values(out)["clip_high"] > 0
    assert torch.allclose(gradient, finite_differences(algorithm, items, at), atol=1e-7)


def test_a_constant_that_is_not_the_longest_response_is_said():
    (note,) = DrGrpo(max_length=1024).remarks(Plan(iterations=1, references=(None,), max_new_tokens=48))
    assert "algorithm.max_length=48" in note
    assert DrGrpo(max_length=48).remarks(Plan(iterations=1, references=(None,), max_new_tokens=48)) == []


def test_of_given_advantages_agrees_with_trl():
    rng, lengths = np.random.default_rng(1), (5, 2, 3)
    algorithm = DrGrpo(max_length=7, kl_coef=0.3, clip_range_high=0.28)
    names = ("old_logprobs", "reference_logprobs", "behavior_logprobs")
    drawn = {name: [-1.0 + 0.4 * rng.standard_normal(n) for n in lengths] for name in names}
    items = trained(algorithm, [judged(lengths, scores=(1.0, -0.5, 0.25))], **drawn)
    rows = [-1.0 + 0.4 * rng.standard_normal(n) for n in lengths]
    loss, gradient, out, batch = evaluate(algorithm, items, rows)
    assert values(out)["clip_high"] + values(out)["clip_low"] > 0
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs,
        batch.old_logprobs_BT.double(),
        batch.advantages_BT[:, 0].double(),
        batch.mask_BT,
        agg="seq_mean_token_sum_norm",
        max_length=7,
        clip_range_high=0.28,
        reference_logprobs_BT=batch.reference_logprobs_BT.double(),
        kl=0.3,
        sampler_weight_BT=(batch.old_logprobs_BT - batch.behavior_logprobs_BT).double().exp().clamp(max=2.0),
    )
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
