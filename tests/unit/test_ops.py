from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinerl.ops.advantages import group_advantages, leave_one_out, unbiased_std
from onlinerl.ops.critic import clipped_value_loss, gae
from onlinerl.ops.logprobs import masked
from onlinerl.ops.margins import logistic
from onlinerl.ops.preference import smoothed
from onlinerl.ops.ratios import bounded_exp, clipped_surrogate, k2, k3, k3_plus
from onlinerl.ops.scaling import adapted_kl, normalized
from onlinerl.ops.whitening import moments, whitening


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slope(function, x: torch.Tensor) -> list[float]:
    return torch.autograd.grad(function(x).sum(), x)[0].tolist()


def test_masked_lets_neither_value_nor_gradient_through():
    values = torch.tensor([[1.0, math.nan, math.inf]], requires_grad=True)
    out = masked(values, torch.tensor([[True, False, False]]))
    assert out.tolist() == [[1.0, 0.0, 0.0]]
    assert torch.autograd.grad((out * torch.tensor(3.0)).sum(), values)[0].tolist() == [[3.0, 0.0, 0.0]]


def test_masked_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shape"):
        masked(torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool))


def test_kl_estimators_by_hand():
    d = leaf(1.0, -1.0, 0.0)
    assert k2(d).tolist() == [0.5, 0.5, 0.0]
    assert k3(d).tolist() == pytest.approx([0.36787944, 0.71828183, 0.0])
    assert k3_plus(d).tolist() == pytest.approx(k3(d).tolist())
    assert slope(k3, d) == pytest.approx([1 - math.exp(-1), 1 - math.e, 0.0])
    assert slope(k3_plus, d) == pytest.approx([1.0, -1.0, 0.0])


def test_kl_of_extreme_ratios_is_finite_and_never_pushes_further_away():
    d = leaf(-1000.0, 1000.0)
    assert torch.isfinite(k3(d)).all()
    assert torch.isfinite(bounded_exp(d)).all()
    assert slope(k3, d) == [0.0, 0.0]
    assert slope(k3_plus, d) == [-1000.0, 1000.0]


def test_kl_gradients_over_an_enumerable_policy():
    """Exact expectations over 6 outcomes: grad E[k2] is grad KL(pi||ref), grad E[k3] is grad KL(ref||pi), grad E[k1] is 0."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(6, dtype=torch.float64), 0)

    def policy():
        return torch.log_softmax(logits, 0)

    def expected(estimator):  # outcomes are drawn from the policy; the draw itself carries no gradient
        return torch.autograd.grad((policy().exp().detach() * estimator(policy() - ref)).sum(), logits)[0]

    reverse = torch.autograd.grad((policy().exp() * (policy() - ref)).sum(), logits)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - policy())).sum(), logits)[0]
    assert torch.allclose(expected(lambda d: d), torch.zeros(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(expected(k2), reverse)
    assert torch.allclose(expected(k3_plus), reverse)
    assert torch.allclose(expected(k3), forward)
    assert not torch.allclose(reverse, forward, atol=1e-3)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_gae_is_the_discounted_sum_of_temporal_differences(rewards, gamma, lam, seed):
    rewards = np.array(rewards)
    values = np.random.default_rng(seed).standard_normal(len(rewards))
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam)
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    direct = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
    assert advantages == pytest.approx(direct, abs=1e-9)
    assert returns == pytest.approx(advantages + values)


def test_gae_edges():
    assert [len(x) for x in gae(np.zeros(0), np.zeros(0), gamma=1.0, lam=1.0)] == [0, 0]
    with pytest.raises(ValueError, match="2 rewards but 3 values"):
        gae(np.zeros(2), np.zeros(3), gamma=1.0, lam=1.0)


def whiten(parts, **options):
    return [*map(whitening(lambda: parts, **options), parts)]


def test_whiten():
    parts = whiten([np.array([1.0, 2.0]), np.array([]), np.array([6.0])])
    assert np.concatenate(parts) == pytest.approx(np.array([-2.0, -1.0, 3.0]) / math.sqrt(14 / 2))
    kept = whiten([np.array([1.0, 2.0]), np.array([6.0])], keep_mean=True)
    assert np.concatenate(kept) == pytest.approx(3.0 + np.array([-2.0, -1.0, 3.0]) / math.sqrt(14 / 2))
    assert [len(p) for p in parts] == [2, 0, 1]
    dust = whiten([np.array([1.0, 1.0 + 1e-9])])[0]
    assert np.abs(dust).max() < 1e-2  # not blown up to 1
    assert whiten([]) == []
    assert [p.tolist() for p in whiten([np.array([3.0])])] == [[0.0]]
    assert [len(p) for p in whiten([np.array([])])] == [0]


@pytest.mark.parametrize("count", [1, 7, 129, 1000, 4097, 50_001])
@pytest.mark.parametrize("ddof", [0, 1])
def test_moments_of_parts_are_numpys_of_all_of_them_to_the_last_bit(monkeypatch, count, ddof):
    """However they are cut up: a step of training must not depend on how much memory there is."""
    monkeypatch.setattr("onlinerl.ops.whitening._BLOCK", 128)
    rng = np.random.default_rng(count)
    numbers = rng.normal(3.0, 10.0 ** rng.integers(-3, 4, count))
    parts = np.split(numbers, np.sort(rng.integers(0, count, 30)))
    if count > ddof:
        assert moments(lambda: iter(parts), ddof=ddof) == (numbers.mean(), numbers.var(ddof=ddof))


def test_normalized_by_everything_so_far():
    # 1, 3 and, from before, 5 and 7 (mean 6, standard deviation 1): mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert normalized(np.array([1.0, 3.0]), [(2, 6.0, 1.0)]) == pytest.approx(np.array([-3.0, -1.0]) / math.sqrt(5))
    assert normalized(np.array([1.0, 3.0])) == pytest.approx([-1.0, 1.0])
    assert normalized(np.array([7.0, 7.0])).tolist() == [0.0, 0.0]  # no spread to divide by
    assert normalized(np.zeros(0)).tolist() == []


def test_adapted_kl():
    """At the target nothing changes; the change is a fifth at most, in proportion to the number of responses."""
    assert adapted_kl(0.1, [], target=6.0, horizon=1000) == 0.1
    assert adapted_kl(0.1, [(6.0, 500)], target=6.0, horizon=1000) == pytest.approx(0.1)
    assert adapted_kl(0.1, [(6.6, 500)], target=6.0, horizon=1000) == pytest.approx(0.1 * 1.05)  # 0.1 above, half a horizon
    assert adapted_kl(0.1, [(600.0, 500), (-3.0, 1000)], target=6.0, horizon=1000) == pytest.approx(0.1 * 1.1 * 0.8)
    assert adapted_kl(0.1, [(12.0, 10**9)], target=6.0, horizon=1000) == pytest.approx(0.1 * 1.2)
    assert adapted_kl(0.1, [(1e9, 1000)] * 99, target=6.0, horizon=1000) == 1.0
    assert adapted_kl(5.0, [(0.0, 1000)] * 999, target=6.0, horizon=1000) == 1e-4


def test_group_advantages():
    assert group_advantages([1.0, 0.0], normalise=True) == pytest.approx([0.70711, -0.70711], abs=1e-5)
    assert group_advantages([3.0, 1.0, 2.0], normalise=False) == pytest.approx([1.0, -1.0, 0.0])
    assert group_advantages([0.1, 0.1, 0.1], normalise=True).tolist() == [0.0, 0.0, 0.0]
    assert unbiased_std(np.array([4.0])) == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages([1.0], normalise=True)
    assert group_advantages([]).tolist() == []  # nobody of the group was judged


def test_leave_one_out():
    assert leave_one_out([3.0, 1.0, 2.0]) == pytest.approx([1.5, -1.5, 0.0])
    assert leave_one_out([3.0, 1.0]).tolist() == [2.0, -2.0]
    assert leave_one_out([0.1, 0.1, 0.1]).tolist() == [0.0, 0.0, 0.0]
    assert leave_one_out([]).tolist() == []


def test_clipped_surrogate_table():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    assert clipped_surrogate(ratio, advantage, 0.2, 0.3).tolist() == pytest.approx([-2.0, -1.3, 1.5, -0.5, 0.8])


def test_dual_clip_bounds_bad_tokens_only():
    ratio, advantage = torch.tensor([9.0, 9.0, 2.0]), torch.tensor([-1.0, 1.0, -1.0])
    assert clipped_surrogate(ratio, advantage, 0.2, 0.2, dual_clip=3.0).tolist() == pytest.approx([3.0, -1.2, 2.0])


def test_clipped_value_loss_takes_the_worse_of_the_two():
    # V near V_old; V beyond the clip towards R; V beyond the clip away from R
    values, old, returns = (torch.tensor(x) for x in ([0.1, 1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 2.0]))
    assert clipped_value_loss(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 0.81, 0.5 * 3.24, 0.5 * 9.0])


@given(z=st.floats(-30, 30), p=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_logistic(z, p):
    at = leaf(z)
    assert logistic(at, p).item() == pytest.approx(logistic(leaf(z), 1.0).item() + (1 - p) * z, abs=1e-9)
    assert slope(lambda x: logistic(x, p), at)[0] == pytest.approx(1 / (1 + math.exp(-z)) - p, abs=1e-12)
    assert logistic(leaf(-z), 1 - p).item() == pytest.approx(logistic(at, p).item())  # the other side of the same label
    # Swapping the two responses but keeping the label turns z around: the slope at zero changes sign
    assert slope(lambda x: logistic(-x, p), leaf(0.0))[0] == pytest.approx(-slope(lambda x: logistic(x, p), leaf(0.0))[0])


def test_logistic_is_stable_far_out():
    assert logistic(leaf(-1e4, 1e4), 1.0).tolist() == [1e4, 0.0]


def test_smoothed():
    assert smoothed(torch.tensor([1.0, 0.8, 0.5]), 0.1).tolist() == pytest.approx([0.9, 0.74, 0.5])
