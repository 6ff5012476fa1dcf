from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import (
    CLIP_KNOBS,
    IMPORTANCE_KNOBS,
    PAID_KNOBS,
    evaluate,
    finite_differences,
    judged,
    sequence,
    single,
    spread,
    trained,
    values,
)
from trl_losses import grpo_loss

from onlinerl.algorithms.reinforce_pp import ReinforcePp

VARIANTS = [{}, {"kl_coef": 0.0, "gamma": 0.9, "importance_sampling_cap": None}]
KNOBS = CLIP_KNOBS | IMPORTANCE_KNOBS | PAID_KNOBS | {"kl_coef": [({}, 0.5), ({}, 0.0)], "gamma": [({}, 0.5)]}
LENGTHS = (3, 1, 2)
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]
REFERENCE = [[-1.2, -0.5, -1.0], [-0.9], [-1.5, -0.1]]


def at_reference(items):
    return -np.concatenate([item.sequences[0].advantages for item in items]).mean()


def advantages(algorithm, *sequences) -> list[np.ndarray]:
    return [item.sequences[0].advantages for item in algorithm.prepare([single(s) for s in sequences])]


def test_value_by_hand():
    # Ratios 1.5 (clipped to 1.2) and 1 with A = (1, -1); ratio 0.9 with A = -2: the mean over 3 tokens
    old = -1.0 - np.log([1.5, 1.0])
    items = [
        single(sequence(2, old_logprobs=old, behavior_logprobs=old, reference_logprobs=-3.0, advantages=[1.0, -1.0])),
        single(sequence(1, 50, old_logprobs=-1.0 - np.log(0.9), behavior_logprobs=-1.0 - np.log(0.9), advantages=-2.0)),
    ]
    loss, _, out, _ = evaluate(ReinforcePp(kl_coef=5.0), items, [-1.0, -1.0])
    assert loss == pytest.approx((-1.2 + 1.0 + 1.8) / 3, rel=1e-5)  # the KL is in the reward
    assert values(out)["kl_reference"] > 0


def test_returns_by_hand():
    # k1 = (0.5, -0.5, 1) at 0.1 each, the score of 2 at the end: r = (-0.05, 0.05, 1.9)
    s = sequence(3, old_logprobs=-1.0, reference_logprobs=[-1.5, -0.5, -2.0], score=2.0)
    assert ReinforcePp(kl_coef=0.1).returns(s).tolist() == pytest.approx([1.9, 1.95, 1.9])
    assert ReinforcePp(kl_coef=0.1, gamma=0.5).returns(s).tolist() == pytest.approx([0.45, 1.0, 1.9])
    assert ReinforcePp(kl_coef=0.1).returns(sequence(0, score=2.0)).tolist() == []


def test_scores_and_what_a_token_pays_may_be_cut_off():
    # k1 = (0.5, -0.5, 1), of which each token pays for at most 0.3, at 0.1: r = (-0.03, 0.03, -0.03 + 1.5)
    s = sequence(3, old_logprobs=-1.0, reference_logprobs=[-1.5, -0.5, -2.0], score=2.0)
    clipped = ReinforcePp(kl_coef=0.1, score_clip=1.5, kl_clip=0.3)
    assert clipped.returns(s).tolist() == pytest.approx([1.47, 1.5, 1.47])
    assert clipped.returns(s.with_(score=-2.0)).tolist() == pytest.approx([-1.53, -1.5, -1.53])
    assert (clipped.score(s), ReinforcePp().score(s)) == (1.5, 2.0), "what the loop takes for earned"


def test_whitened_by_hand():
    # Returns 3, 3 and 0: mean 2, unbiased variance 3
    one, other = advantages(ReinforcePp(kl_coef=0.0), sequence(2, score=3.0), sequence(1, score=0.0))
    assert one.tolist() == pytest.approx([1 / 3**0.5] * 2)
    assert other.tolist() == pytest.approx([-2 / 3**0.5])


def test_over_all_tokens_of_the_iteration_the_mean_is_0_and_the_variance_1():
    rng = np.random.default_rng(0)
    drawn = [sequence(n, old_logprobs=-rng.random(n), reference_logprobs=-rng.random(n), score=float(n)) for n in (1, 5, 3)]
    tokens = np.concatenate(advantages(ReinforcePp(kl_coef=0.5, gamma=0.9), *drawn))
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.var(ddof=1) == pytest.approx(1, abs=1e-5)


def test_without_kl_and_discount_a_response_has_one_advantage():
    for one in advantages(ReinforcePp(kl_coef=0.0), sequence(4, score=3.0), sequence(2, score=0.0), sequence(1, score=1.0)):
        assert len(set(one.tolist())) == 1


def test_a_shift_of_all_scores_changes_nothing():
    rows = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS, "reference_logprobs": REFERENCE}
    plain, moved = (
        trained(ReinforcePp(kl_coef=0.1), [judged(LENGTHS, scores=[s + shift for s in (1.0, -0.5, 0.25)])], **rows)
        for shift in (0.0, 10.0)
    )
    for a, b in zip(plain, moved, strict=True):
        assert a.sequences[0].advantages == pytest.approx(b.sequences[0].advantages, abs=1e-5)


def test_dust_is_not_blown_up():
    (one,) = advantages(ReinforcePp(kl_coef=1e-6), sequence(2, old_logprobs=-1.0, reference_logprobs=[-1.1, -0.9], score=1.0))
    assert np.abs(one).max() < 0.01


def test_one_response_is_enough_and_a_missing_log_prob_is_named():
    assert ReinforcePp().needs.min_samples == 1
    assert (ReinforcePp().needs.kl_in_reward, ReinforcePp(kl_coef=0.0).needs.kl_in_reward) == (True, False)
    with pytest.raises(ValueError, match=r"sequence\.reference_logprobs"):
        advantages(ReinforcePp(), sequence(1).with_(reference_logprobs=None))


def test_gradient_by_finite_differences():
    algorithm = ReinforcePp(kl_coef=0.1)
    rows = {"old_logprobs": REFERENCE, "behavior_logprobs": LOGPROBS, "reference_logprobs": LOGPROBS}
    items = trained(algorithm, [judged(LENGTHS, scores=(1.0, -0.5, 0.25))], **rows)
    _, gradient, out, _ = evaluate(algorithm, items, LOGPROBS)
    assert values(out)["clip_high"] + values(out)["clip_low"] > 0
    assert torch.allclose(gradient, finite_differences(algorithm, items, LOGPROBS), atol=1e-7)


def test_of_given_advantages_agrees_with_trl():
    """The loss; TRL has no such advantages."""
    rng = np.random.default_rng(1)
    old = [-1.0 + 0.4 * rng.standard_normal(n) for n in LENGTHS]
    rows = {"old_logprobs": old, "behavior_logprobs": old, "reference_logprobs": REFERENCE}
    items = trained(ReinforcePp(), [judged(LENGTHS, scores=(1.0, -0.5, 0.25))], **rows)
    loss, gradient, _, batch = evaluate(ReinforcePp(), items, LOGPROBS)
    logprobs = spread(LOGPROBS, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs, batch.old_logprobs_BT.double(), batch.advantages_BT.double(), batch.mask_BT, agg="token_mean"
    )
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
