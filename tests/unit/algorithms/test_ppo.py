from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, items_of, judged, sequence, single, spread, values
from trl_losses import grpo_loss

from onlinerl.algorithms.ppo import Ppo


def prepared(algorithm: Ppo, *sequences) -> list:
    return [item.sequences[0] for item in algorithm.prepare([single(s) for s in sequences])]


def loss_of(algorithm: Ppo, items, rows, value_rows, **outputs):
    from onlinerl.ops.batching import collate

    value = spread(value_rows, collate(items)).requires_grad_()
    mean, gradient, out, batch = evaluate(algorithm, items, rows, values_BT=value, **outputs)
    (value_gradient,) = torch.autograd.grad(out.total / sum(item.count("token") for item in items), value)
    return mean, gradient, value_gradient, values(out), batch


def test_advantages_and_returns_by_hand():
    # k1 = (0.5, -0.5), so r = (-0.05, 0.05 + 1); delta_1 = 1.05 - 0.4, delta_0 = -0.05 + 0.4 - 0.2
    s = sequence(2, old=-1.0, reference=[-1.5, -0.5], values=[0.2, 0.4], score=1.0)
    (out,) = prepared(Ppo(kl=0.1, lam=0.5, whiten_advantages=False), s)
    assert out.advantages.tolist() == pytest.approx([0.475, 0.65])
    assert out.returns.tolist() == pytest.approx([0.675, 1.05])


def test_with_lambda_and_gamma_1_advantages_are_returns_to_go_minus_values():
    s = sequence(4, old=[-1.0, -2.0, -0.5, -1.0], reference=-1.0, values=[0.3, -0.2, 0.5, 0.1], score=2.0)
    algorithm = Ppo(kl=0.2, lam=1.0, whiten_advantages=False)
    (out,) = prepared(algorithm, s)
    to_go = np.cumsum(algorithm.rewards(s)[::-1])[::-1]
    assert out.advantages == pytest.approx(to_go - s.values, abs=1e-6)
    assert out.returns == pytest.approx(to_go, abs=1e-6)


def test_with_lambda_0_advantages_are_temporal_differences():
    s = sequence(3, values=[0.3, -0.2, 0.5], score=2.0)
    (out,) = prepared(Ppo(kl=0.0, lam=0.0, gamma=0.9, whiten_advantages=False), s)
    assert out.advantages.tolist() == pytest.approx([0.9 * -0.2 - 0.3, 0.9 * 0.5 + 0.2, 2.0 - 0.5])


def test_only_a_terminal_score_and_no_values_give_the_score_everywhere():
    (out,) = prepared(Ppo(kl=0.0, lam=1.0, whiten_advantages=False), sequence(5, score=1.7))
    assert out.advantages.tolist() == pytest.approx([1.7] * 5)


def test_whitening_is_over_all_tokens_of_the_iteration_and_spares_the_returns():
    sequences = [sequence(n, values=0.1 * n, score=float(n)) for n in (1, 4, 2)]
    plain, white = (prepared(Ppo(whiten_advantages=w), *sequences) for w in (False, True))
    tokens = np.concatenate([s.advantages for s in white])
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.std() == pytest.approx(1, abs=1e-6)
    for a, b in zip(plain, white, strict=True):
        assert a.returns == pytest.approx(b.returns)


def test_missing_eos():
    cut, done = (sequence(2, score=5.0, finish_reason=reason) for reason in ("length", "stop"))
    assert Ppo().rewards(cut).tolist() == [0.0, 5.0]
    assert Ppo(missing_eos_score=-1.0).rewards(cut).tolist() == [0.0, -1.0]
    assert Ppo(missing_eos_score=-1.0).rewards(done).tolist() == [0.0, 5.0]


def test_an_empty_response_and_an_empty_iteration_are_harmless():
    out = prepared(Ppo(), sequence(0, score=3.0), sequence(2, score=1.0))
    assert [len(s.advantages) for s in out] == [0, 2]
    assert Ppo().prepare([]) == []


def test_scores_fall_back_to_win_rates():
    items = items_of(Ppo(), judged([1, 2], preferences=((0.5, 0.9), (0.1, 0.5))))
    assert [item.sequences[0].score for item in items] == pytest.approx([0.7, 0.3])


def test_what_prepare_lacks_is_named():
    with pytest.raises(ValueError, match=r"sequence\.values"):
        prepared(Ppo(kl=0.0), sequence(1).with_(values=None))
    with pytest.raises(ValueError, match=r"sequence\.reference"):
        prepared(Ppo(), sequence(1).with_(reference=None))
    with pytest.raises(ValueError, match="values_BT"):
        evaluate(Ppo(), [single(sequence(1))], [0.0])


def test_on_policy_the_policy_loss_is_minus_the_mean_advantage():
    items = [single(sequence(3, advantages=[1.0, 2.0, 3.0])), single(sequence(1, advantages=-2.0))]
    mean, gradient, _, _, _ = loss_of(Ppo(vf_coef=0.0), items, [0.0, 0.0], [0.0, 0.0])
    assert mean == pytest.approx(-1.0)
    assert gradient[0].tolist() == pytest.approx([-0.25, -0.5, -0.75])
    assert gradient[1].tolist() == pytest.approx([0.5, 0.0, 0.0])


def test_value_loss_at_the_old_values_is_half_the_mean_square():
    items = [single(sequence(2, values=[1.0, 2.0], returns=[1.5, 0.0]))]
    mean, _, gradient, metrics, _ = loss_of(Ppo(vf_coef=1.0), items, [0.0], [[1.0, 2.0]])
    assert mean == pytest.approx(0.5 * (0.25 + 4.0) / 2)
    assert gradient[0].tolist() == pytest.approx([-0.25, 1.0])
    assert metrics["value_loss"] == pytest.approx(1.0625)


def test_value_loss_stops_at_the_clip():
    # V = 1 came from V_old = 0 and overshot clip 0.2 on the way to R = 2: error of 0.2 counts, no gradient
    items = [single(sequence(1, values=0.0, returns=2.0))]
    mean, _, gradient, _, _ = loss_of(Ppo(vf_coef=1.0), items, [0.0], [1.0])
    assert mean == pytest.approx(0.5 * 1.8**2, rel=1e-6)
    assert gradient.item() == 0.0
    mean, _, gradient, _, _ = loss_of(Ppo(vf_coef=1.0, value_clip=None), items, [0.0], [1.0])
    assert (mean, gradient.item()) == (pytest.approx(0.5), pytest.approx(-1.0))


def test_kl_in_the_loss_has_the_value_of_k3_and_the_gradient_of_k2():
    items = [single(sequence(2, reference=-1.0))]
    algorithm = Ppo(kl=0.5, kl_in="loss", vf_coef=0.0)
    mean, gradient, _, metrics, _ = loss_of(algorithm, items, [0.0], [0.0])  # d = 1
    assert mean == pytest.approx(0.5 * 0.36787944, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.25, 0.25])
    assert metrics["kl_reference"] == pytest.approx(0.36787944, rel=1e-6)
    assert algorithm.rewards(items[0].sequences[0]).tolist() == [0.0, 0.0]  # not paid twice


def test_entropy_bonus():
    items = [single(sequence(2))]
    entropy = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    mean, _, _, metrics, _ = loss_of(Ppo(entropy_coef=0.1, kl=0.0), items, [0.0], [0.0], entropy_BT=entropy)
    assert mean == pytest.approx(-0.2)
    assert metrics["entropy"] == pytest.approx(2.0)
    assert Ppo(entropy_coef=0.1).needs().entropy
    with pytest.raises(ValueError, match="entropy_BT"):
        loss_of(Ppo(entropy_coef=0.1), items, [0.0], [0.0])


def test_without_kl_no_reference_is_needed():
    assert (Ppo().needs().reference, Ppo().default_reference) == (True, "fixed")
    assert (Ppo(kl=0.0).needs().reference, Ppo(kl=0.0).default_reference) == (False, "none")


def test_policy_part_agrees_with_trl():
    rng, lengths = np.random.default_rng(2), (5, 2, 3)

    def draw(n):
        return -1.0 + 0.4 * rng.standard_normal(n)

    items = [single(sequence(n, old=draw(n), behaviour=draw(n), advantages=rng.standard_normal(n))) for n in lengths]
    rows = [draw(n) for n in lengths]
    mean, gradient, _, metrics, batch = loss_of(Ppo(vf_coef=0.0, kl=0.0), items, rows, [0.0] * 3)
    assert metrics["clip_high"] + metrics["clip_low"] > 0
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs,
        batch.old_BT.double(),
        batch.advantages_BT.double(),
        batch.mask_BT,
        agg="token_mean",
        sampler_weight_BT=(batch.old_BT - batch.behaviour_BT).double().exp().clamp(max=2.0),
    )
    assert mean == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
