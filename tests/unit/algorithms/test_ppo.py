from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import PAID_KNOBS, RESPONSE_KNOBS, evaluate, items_of, judged, sequence, single, spread, values
from trl_losses import grpo_loss

from onlinerl.algorithms.ppo import Ppo
from onlinerl.batch import Outputs
from onlinerl.learners.toy import ToyLearner
from onlinerl.ops.batching import collate
from onlinerl.types import TrainSequence

REWARD = {"kl_in": "reward"}
VARIANTS = [
    {},
    {"kl_in": "reward", "target_kl": 1.0, "kl_horizon": 10, "whiten_rewards": True, "clip_range_value": 0.2},
    {"entropy_coef": 0.01, "dual_clip": 3.0, "normalize_scores": False},
    {"kl_coef": 0.0},
]
CAPPED = {"importance_sampling_cap": 0.9}
KNOBS = (
    RESPONSE_KNOBS
    | PAID_KNOBS
    | {
        "kl_coef": [({}, 0.5), (REWARD, 0.5), ({}, 0.0)],
        "kl_in": [({}, "reward")],
        "target_kl": [(REWARD, 1.0)],
        "kl_horizon": [(REWARD | {"target_kl": 1.0}, 100)],
        "gamma": [({}, 0.5)],
        "lam": [({}, 0.5)],
        "clip_range": [({}, 0.05)],
        "dual_clip": [({}, 1.01)],
        "normalize_scores": [({}, False)],
        "kl_clip": [(REWARD, 0.05)],
        "whiten_rewards": [({}, True)],
        "missing_eos_score": [({}, -1.0)],
        "whiten_advantages": [({}, False)],
        "clip_range_value": [({}, 0.1), ({"clip_range_value": 0.1}, 0.3)],
        "vf_coef": [({}, 1.0)],
        "entropy_coef": [({}, 0.1)],
        "importance_sampling_cap": [({}, 0.9), ({}, None), ({"importance_sampling_cap": 0.9}, None)],
        "p_reset": [({}, 0.5)],
        "importance_sampling_mode": [(CAPPED, mode) for mode in ("token_mask", "sequence_truncate", "sequence_mask")],
        "critic": [({}, "shared")],
        "critic_learning_rate": [({}, 1e-3)],
        "critic_model": [({}, "org/reward-model")],
        "critic_warmup": [({}, 2)],
    }
)


def stops_gradients(algorithm):
    """What is between the value of k3 and the gradient of k2, with a KL in the loss."""
    return algorithm.kl_in == "loss" and algorithm.kl_coef > 0


def at_reference(items):
    advantages, returns, values = (
        np.concatenate([getattr(item.sequences[0], name) for item in items]) for name in ("advantages", "returns", "values")
    )
    return -advantages.mean() + 0.1 * 0.5 * np.mean((values - returns) ** 2)


def prepared(algorithm: Ppo, *sequences, past=()) -> list:
    return [item.sequences[0] for item in algorithm.prepare([single(s) for s in sequences], past)]


def raw(**knobs) -> Ppo:
    """With the KL in the reward, scores in the oracle's units, and advantages as they are: what can be followed by hand."""
    return Ppo(**{"kl_in": "reward", "normalize_scores": False, "whiten_advantages": False} | knobs)


def loss_of(algorithm: Ppo, items, rows, value_rows, **outputs):
    value = spread(value_rows, collate(items)).requires_grad_()
    mean, gradient, out, batch = evaluate(algorithm, items, rows, values_BT=value, **outputs)
    (value_gradient,) = torch.autograd.grad(out.total / sum(item.count("token") for item in items), value)
    return mean, gradient, value_gradient, values(out), batch


def test_value_by_hand():
    # Ratios 1.5 (clipped to 1.2) and 1, A = (1, -1); values (1, 0) against returns (0, 2); d = (1, 0)
    item = single(
        sequence(
            2,
            old_logprobs=[-np.log(1.5), 0.0],
            behavior_logprobs=[-np.log(1.5), 0.0],
            reference_logprobs=[-1.0, 0.0],
            advantages=[1.0, -1.0],
            returns=[0.0, 2.0],
        )
    )
    policy, value, kl = (-1.2 + 1.0) / 2, 0.5 * (1.0 + 4.0) / 2, 0.36787944 / 2
    mean = loss_of(Ppo(), [item], [0.0], [[1.0, 0.0]])[0]
    assert mean == pytest.approx(policy + 0.05 * kl + 0.1 * value, rel=1e-5)


def test_advantages_and_returns_by_hand():
    # k1 = (0.5, -0.5), so r = (-0.05, 0.05 + 1); delta_1 = 1.05 - 0.4, delta_0 = -0.05 + 0.4 - 0.2
    s = sequence(2, old_logprobs=-1.0, reference_logprobs=[-1.5, -0.5], values=[0.2, 0.4], score=1.0)
    (out,) = prepared(raw(kl_coef=0.1, lam=0.5), s)
    assert out.advantages.tolist() == pytest.approx([0.475, 0.65])
    assert out.returns.tolist() == pytest.approx([0.675, 1.05])


def test_with_lambda_and_gamma_1_advantages_are_returns_to_go_minus_values():
    s = sequence(4, old_logprobs=[-1.0, -2.0, -0.5, -1.0], reference_logprobs=-1.0, values=[0.3, -0.2, 0.5, 0.1], score=2.0)
    algorithm = raw(kl_coef=0.2, lam=1.0)
    (out,) = prepared(algorithm, s)
    to_go = np.cumsum(algorithm.rewards(s, 2.0, 0.2)[::-1])[::-1]
    assert out.advantages == pytest.approx(to_go - s.values, abs=1e-6)
    assert out.returns == pytest.approx(to_go, abs=1e-6)


def test_with_lambda_0_advantages_are_temporal_differences():
    s = sequence(3, values=[0.3, -0.2, 0.5], score=2.0)
    (out,) = prepared(raw(kl_coef=0.0, lam=0.0, gamma=0.9), s)
    assert out.advantages.tolist() == pytest.approx([0.9 * -0.2 - 0.3, 0.9 * 0.5 + 0.2, 2.0 - 0.5])


def test_only_a_terminal_score_and_no_values_give_the_score_everywhere():
    (out,) = prepared(raw(kl_coef=0.0, lam=1.0), sequence(5, score=1.7))
    assert out.advantages.tolist() == pytest.approx([1.7] * 5)


def test_whitening_is_over_all_tokens_of_the_iteration_and_spares_the_returns():
    sequences = [sequence(n, values=0.1 * n, score=float(n)) for n in (1, 4, 2)]
    plain, white = (prepared(raw(whiten_advantages=w), *sequences) for w in (False, True))
    tokens = np.concatenate([s.advantages for s in white])
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.std(ddof=1) == pytest.approx(1, abs=1e-6)
    for a, b in zip(plain, white, strict=True):
        assert a.returns == pytest.approx(b.returns)


def test_missing_eos():
    cut, done = (sequence(2, score=5.0, finish_reason=reason) for reason in ("length", "stop"))
    for knobs, returns in (({}, [5.0, 5.0]), ({"missing_eos_score": -1.0}, [-1.0, 5.0])):
        out = prepared(raw(kl_coef=0.0, lam=1.0, **knobs), cut, done)
        assert [s.returns.tolist() for s in out] == [[r, r] for r in returns]


def test_an_empty_response_and_an_empty_iteration_are_harmless():
    out = prepared(Ppo(), sequence(0, score=3.0), sequence(2, score=1.0))
    assert [len(s.advantages) for s in out] == [0, 2]
    assert list(Ppo().prepare([])) == []


def test_scores_fall_back_to_win_rates():
    items = items_of(Ppo(), judged([1, 2], preferences=((0.5, 0.9), (0.1, 0.5))))
    assert [item.sequences[0].score for item in items] == pytest.approx([0.7, 0.3])


def test_what_prepare_lacks_is_named():
    with pytest.raises(ValueError, match=r"sequence\.values"):
        prepared(Ppo(kl_coef=0.0), sequence(1).with_(values=None))
    with pytest.raises(ValueError, match=r"sequence\.reference_logprobs"):
        prepared(raw(), sequence(1).with_(reference_logprobs=None))
    with pytest.raises(ValueError, match="values_BT"):
        evaluate(Ppo(), [single(sequence(1))], [0.0])


# --- the price of the KL ---


def learned(algorithm: Ppo, steps: int = 4) -> np.ndarray:
    """Logits after the first iteration of a toy policy that starts as its own reference: several optimizer steps on one batch."""
    learner = ToyLearner(3, algorithm, base="base")
    drawn = [TrainSequence(prompt_ids=(0,), response_ids=(token, token), score=float(token == 1)) for token in (0, 1, 2)]
    logprobs = learner.logprobs(drawn)
    filled = [
        s.with_(old_logprobs=p, reference_logprobs=p, behavior_logprobs=p, values=np.zeros(2, np.float32))
        for s, p in zip(drawn, logprobs, strict=True)
    ]
    items = list(algorithm.prepare([single(s) for s in filled]))
    list(learner.update([items] * steps, [0.05] * steps))
    return learner.logits.detach().numpy()


def test_a_kl_in_the_loss_holds_the_policy_back_within_the_first_iteration():
    free, held = learned(Ppo(kl_coef=0.0)), learned(Ppo(kl_coef=5.0))
    assert free[1] > held[1] + 0.02 > 0.02
    # At the reference it has no gradient.
    assert np.array_equal(learned(Ppo(kl_coef=0.0), steps=1), learned(Ppo(kl_coef=5.0), steps=1))
    # In the reward it is that of the rollouts, which come from the reference: `check` says so.
    assert np.array_equal(free, learned(Ppo(kl_coef=5.0, kl_in="reward")))


def test_the_price_in_the_reward_is_adapted_by_what_earlier_iterations_measured():
    algorithm = raw(kl_coef=0.1, lam=1.0, target_kl=6.0, kl_horizon=1000)
    s = sequence(2, old_logprobs=-1.0, reference_logprobs=[-1.5, -0.5])
    past = [{"kl_rollouts": 6.6, "responses": 500.0}, {}, {"kl_rollouts": 60.0, "responses": 1000.0}]
    price = 0.1 * 1.05 * 1.2
    assert prepared(algorithm, s, past=past)[0].returns.tolist() == pytest.approx([0.0, price * 0.5])
    assert prepared(algorithm, s)[0].returns.tolist() == pytest.approx([0.0, 0.05])
    assert prepared(raw(kl_coef=0.1, lam=1.0), s, past=past)[0].returns.tolist() == pytest.approx([0.0, 0.05])  # no target
    assert algorithm.figures([single(s)], past)["kl_coef"] == pytest.approx(price)
    slower = raw(kl_coef=0.1, lam=1.0, target_kl=6.0, kl_horizon=2000)
    assert slower.figures([single(s)], past)["kl_coef"] == pytest.approx(0.1 * 1.025 * 1.1)


def test_scores_and_what_a_token_pays_are_cut_off():
    s = sequence(2, old_logprobs=-1.0, reference_logprobs=[-3.0, -0.5], score=7.0)
    assert prepared(raw(kl_coef=0.1, lam=1.0), s)[0].returns.tolist() == pytest.approx([7 - 0.2 + 0.05, 7.05])
    assert prepared(raw(kl_coef=0.1, lam=1.0, score_clip=4.0), s)[0].returns.tolist() == pytest.approx([4 - 0.2 + 0.05, 4.05])
    paid = raw(kl_coef=0.1, lam=1.0, kl_clip=0.25)
    assert prepared(paid, s)[0].returns.tolist() == pytest.approx([7.0, 7.025])
    assert paid.figures([single(s)])["kl_rollouts"] == pytest.approx(1.5), "what is measured is not cut off"
    # Of normalized scores: 7 and -7 are 1 and -1
    two = [sequence(1, score=score) for score in (7.0, -7.0)]
    cut = Ppo(kl_coef=0.0, lam=1.0, whiten_advantages=False, score_clip=0.5)
    assert [p.returns[0] for p in prepared(cut, *two)] == pytest.approx([0.5, -0.5])


# --- the critic ---


def test_scores_are_normalized_by_all_scores_so_far():
    # 4 and 6 after 1 and 3: mean 3.5, variance (6.25 + 0.25 + 0.25 + 6.25) / 4
    past = [{"responses": 2.0, "score_mean": 2.0, "score_std": 1.0}]
    out = prepared(Ppo(kl_coef=0.0, lam=1.0), sequence(2, score=4.0), sequence(1, score=6.0), past=past)
    assert [s.returns[-1] for s in out] == pytest.approx([0.5 / 3.25**0.5, 2.5 / 3.25**0.5], rel=1e-6)
    assert [s.returns[-1] for s in prepared(Ppo(kl_coef=0.0, lam=1.0), sequence(1, score=4.0), sequence(1, score=6.0))] == [
        -1.0,
        1.0,
    ]


def test_rewards_are_whitened_and_keep_their_mean():
    # Rewards 0, 0, 3: mean 1, unbiased variance 3
    out = prepared(raw(kl_coef=0.0, lam=1.0, gamma=0.0, whiten_rewards=True), sequence(3, score=3.0))
    assert out[0].returns.tolist() == pytest.approx([1 - 1 / 3**0.5, 1 - 1 / 3**0.5, 1 + 2 / 3**0.5])


def test_figures_by_hand():
    one = sequence(2, old_logprobs=-1.0, reference_logprobs=[-1.5, -2.0], values=[1.0, 2.0], score=4.0)
    other = sequence(1, old_logprobs=-1.0, reference_logprobs=-0.5, values=0.5, score=2.0, finish_reason="length")
    figures = raw(lam=1.0, kl_coef=0.5, missing_eos_score=0.0).figures([single(one), single(other)])
    # k1: 0.5 and 1.0; -0.5. Returns: 4 - 0.25 - 0.5, 4 - 0.5; 0 + 0.25
    returns, values_ = np.array([3.25, 3.5, 0.25]), np.array([1.0, 2.0, 0.5])
    assert figures == pytest.approx(
        {
            "responses": 2.0,
            "score_mean": 2.0,
            "score_std": 2.0,
            "kl_coef": 0.5,
            "kl_rollouts": 0.5,
            "explained_variance": 1 - (returns - values_).var() / returns.var(),
        }
    )
    assert raw().figures([]) == {}
    assert "explained_variance" not in raw(kl_coef=0.0, lam=1.0).figures([single(sequence(2, score=1.0))])  # nothing to explain


def test_a_perfect_critic_explains_everything_and_a_constant_one_nothing():
    def explained(*values_):
        sequences = [sequence(1, values=v, score=s) for v, s in zip(values_, (1.0, 3.0), strict=True)]
        return raw(kl_coef=0.0, lam=1.0).figures([single(s) for s in sequences])["explained_variance"]

    assert explained(1.0, 3.0) == pytest.approx(1.0)
    assert explained(7.0, 7.0) == pytest.approx(0.0)


def test_in_the_warm_up_only_the_critic_learns():
    algorithm = Ppo(critic_warmup=2, entropy_coef=0.1, kl_coef=0.5, vf_coef=1.0)
    s = sequence(2, reference_logprobs=-1.0, old_logprobs=-0.5, behavior_logprobs=-0.5, values=[1.0, 2.0], score=1.0)
    entropy = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    one = {"responses": 1.0, "score_mean": 0.0, "score_std": 1.0}
    for past, weight in (([], 0.0), ([one], 0.0), ([one, {}], 0.0), ([one, one], 1.0)):  # {}: an iteration without a step
        items = [single(p) for p in prepared(algorithm, s, past=past)]
        _, gradient, value_gradient, _, _ = loss_of(algorithm, items, [-0.4], [[0.9, 1.9]], entropy_BT=entropy)
        assert items[0].sequences[0].policy_weight == weight
        assert bool(gradient.abs().max() > 0) == bool(weight)
        assert value_gradient.abs().max() > 0


@pytest.mark.parametrize("level", [5.0, 50.0])
def test_the_critic_learns_returns_of_any_size(level):
    """Scores of 5 (50) plus or minus a fifth that a feature of the prompt explains, a head that starts at 0, 3 iterations of 60 steps.

    In the score's units, within 0.2 of values computed once an iteration, the same head learns next to nothing.
    """

    def explained(algorithm: Ppo) -> float:
        rng, head = np.random.default_rng(0), torch.nn.Linear(4, 1)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        past: list[dict[str, float]] = []
        for _ in range(4):
            features = rng.standard_normal((64, 4)).astype(np.float32)
            value = head(torch.from_numpy(features))
            items = [
                single(sequence(1, score=level * (1 + 0.2 * f[0]), values=v))
                for f, v in zip(features, value.detach().numpy(), strict=True)
            ]
            figures = algorithm.figures(items, past)
            batch = collate(list(algorithm.prepare(items, past)))
            past.append(figures)
            for _ in range(60):
                outputs = Outputs(logprobs_BT=torch.zeros(64, 1), values_BT=head(torch.from_numpy(features)))
                optimizer.zero_grad()
                algorithm.loss(outputs, batch).total.div(64).backward()
                optimizer.step()
        return past[-1]["explained_variance"]  # of the values before the last iteration's training

    assert explained(Ppo(kl_coef=0.0)) > 0.9
    assert explained(Ppo(kl_coef=0.0, normalize_scores=False, clip_range_value=0.2)) < 0.05


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
    mean, _, gradient, _, _ = loss_of(Ppo(vf_coef=1.0, clip_range_value=0.2), items, [0.0], [1.0])
    assert mean == pytest.approx(0.5 * 1.8**2, rel=1e-6)
    assert gradient.item() == 0.0
    mean, _, gradient, _, _ = loss_of(Ppo(vf_coef=1.0, clip_range_value=None), items, [0.0], [1.0])
    assert (mean, gradient.item()) == (pytest.approx(0.5), pytest.approx(-1.0))


def test_kl_in_the_loss_has_the_value_of_k3_and_the_gradient_of_k2():
    items = [single(sequence(2, reference_logprobs=-1.0))]
    algorithm = Ppo(kl_coef=0.5, kl_in="loss", vf_coef=0.0)
    mean, gradient, _, metrics, _ = loss_of(algorithm, items, [0.0], [0.0])  # d = 1
    assert mean == pytest.approx(0.5 * 0.36787944, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.25, 0.25])
    assert metrics["kl_reference"] == pytest.approx(0.36787944, rel=1e-6)
    assert algorithm.rewards(items[0].sequences[0], 0.0, 0.5).tolist() == [0.0, 0.0]  # not paid twice


def test_entropy_bonus():
    items = [single(sequence(2))]
    entropy = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    mean, _, _, metrics, _ = loss_of(Ppo(entropy_coef=0.1, kl_coef=0.0), items, [0.0], [0.0], entropy_BT=entropy)
    assert mean == pytest.approx(-0.2)
    assert metrics["entropy"] == pytest.approx(2.0)
    assert Ppo(entropy_coef=0.1).needs.entropy
    with pytest.raises(ValueError, match="entropy_BT"):
        loss_of(Ppo(entropy_coef=0.1), items, [0.0], [0.0])


def test_without_kl_no_reference_is_needed():
    assert (Ppo().needs.reference, Ppo().reference) == (True, "fixed")
    assert (Ppo(kl_coef=0.0).needs.reference, Ppo(kl_coef=0.0).reference) == (False, "none")


def test_policy_part_agrees_with_trl():
    rng, lengths = np.random.default_rng(2), (5, 2, 3)

    def draw(n):
        return -1.0 + 0.4 * rng.standard_normal(n)

    items = [
        single(sequence(n, old_logprobs=draw(n), behavior_logprobs=draw(n), advantages=rng.standard_normal(n))) for n in lengths
    ]
    rows = [draw(n) for n in lengths]
    mean, gradient, _, metrics, batch = loss_of(Ppo(vf_coef=0.0, kl_coef=0.0), items, rows, [0.0] * 3)
    assert metrics["clip_high"] + metrics["clip_low"] > 0
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs,
        batch.old_logprobs_BT.double(),
        batch.advantages_BT.double(),
        batch.mask_BT,
        agg="token_mean",
        sampler_weight_BT=(batch.old_logprobs_BT - batch.behavior_logprobs_BT).double().exp().clamp(max=2.0),
    )
    assert mean == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
