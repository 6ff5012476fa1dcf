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
    sequence,
    single,
    trained,
    values,
)

from onlinerl.algorithms.reinforce_pp_baseline import ReinforcePpBaseline

VARIANTS = [{}, {"kl_coef": 0.0, "importance_sampling_cap": None}]
KNOBS = CLIP_KNOBS | IMPORTANCE_KNOBS | {"kl_coef": [({}, 0.5), ({}, 0.0)]}
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]


def at_reference(items):
    return -np.concatenate([item.sequences[0].advantages for item in items]).mean()


def advantages(items) -> list[list[float]]:
    return [item.sequences[0].advantages.tolist() for item in items]


def test_value_by_hand():
    # Ratios 1.5 (clipped to 1.2) and 1, A = (1, -1); d = (2, 1) nats, so k2 = (2, 0.5)
    old = -1.0 - np.log([1.5, 1.0])
    item = single(sequence(2, old_logprobs=old, behavior_logprobs=old, reference_logprobs=[-3.0, -2.0], advantages=[1.0, -1.0]))
    loss, gradient, out, _ = evaluate(ReinforcePpBaseline(kl_coef=0.1), [item], [-1.0])
    assert loss == pytest.approx((-1.2 + 0.2 + 1.0 + 0.05) / 2, rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([0.1 * 2.0 / 2, (1.0 + 0.1 * 1.0) / 2], rel=1e-6)  # of k2: d
    assert values(out)["kl_reference"] == pytest.approx(1.25)


def test_advantages_by_hand():
    # Centred within their group: 1 on two tokens, -1 on one; 3 on one, -3 on two. Sum -2, squares 30 over 6 tokens.
    groups = [judged([2, 1], scores=(12.0, 10.0)), judged([1, 2], scores=(3.0, -3.0))]
    mean, std = -2 / 6, ((30 - 4 / 6) / 5) ** 0.5
    expected = [[(a - mean) / std] * n for a, n in ((1, 2), (-1, 1), (3, 1), (-3, 2))]
    for got, wanted in zip(advantages(trained(ReinforcePpBaseline(), groups)), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_over_all_tokens_the_mean_is_0_and_the_variance_1_and_a_response_has_one_advantage():
    items = trained(
        ReinforcePpBaseline(), [judged([3, 1, 2], scores=(1.0, -0.5, 0.25)), judged([1, 5, 2], scores=(9.0, 3.0, 3.0))]
    )
    assert all(len(set(one)) == 1 for one in advantages(items))
    tokens = np.concatenate(advantages(items))
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.var(ddof=1) == pytest.approx(1, abs=1e-5)


def test_a_shift_for_each_prompt_changes_nothing():
    plain = trained(ReinforcePpBaseline(), [judged([3, 1], scores=(1.0, -0.5)), judged([1, 5], scores=(9.0, 3.0))])
    moved = trained(ReinforcePpBaseline(), [judged([3, 1], scores=(8.0, 6.5)), judged([1, 5], scores=(6.0, 0.0))])
    for a, b in zip(advantages(plain), advantages(moved), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_kl_is_in_the_loss_and_one_response_has_no_baseline():
    assert not ReinforcePpBaseline().needs.kl_in_reward
    assert ReinforcePpBaseline().items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})


def test_gradient_by_finite_differences():
    algorithm = ReinforcePpBaseline(kl_coef=0.3)
    rows = {"old_logprobs": [[-1.3, -0.4, -2.2], [-0.5], [-1.4, -0.9]], "behavior_logprobs": LOGPROBS}
    items = trained(
        algorithm, [judged([3, 1, 2], scores=(1.0, -0.5, 0.25))], reference_logprobs=[[-1.0] * 3, [-1.0], [-1.0] * 2], **rows
    )
    _, gradient, out, _ = evaluate(algorithm, items, LOGPROBS)
    assert values(out)["clip_high"] + values(out)["clip_low"] > 0
    assert torch.allclose(gradient, finite_differences(algorithm, items, LOGPROBS), atol=1e-7)
