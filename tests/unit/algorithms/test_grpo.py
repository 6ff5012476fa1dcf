from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import RESPONSE_KNOBS, evaluate, items_of, judged, sequence, single, spread, values
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from trl_losses import grpo_loss

from onlinerl.algorithms.grpo import Grpo
from onlinerl.batch import Outputs
from onlinerl.ops.batching import collate

VARIANTS = [
    {"std_norm": "group", "agg": "seq_mean_token_mean"},
    {"std_norm": "batch", "agg": "token_mean", "kl_coef": 0.04, "clip_range_high": 0.28, "importance_sampling_cap": None},
    {"importance_sampling_mode": "token_mask", "importance_sampling_floor": 0.5, "importance_sampling_filter": (0.5, 2.0)},
    {"std_norm": "none", "agg": "token_mean"},
]
CAPPED = {"importance_sampling_cap": 0.9}
KNOBS = RESPONSE_KNOBS | {
    "std_norm": [({}, "batch"), ({}, "none"), ({"std_norm": "batch"}, "none")],
    "agg": [({}, "token_mean")],
    "clip_range_low": [({}, 0.05)],
    "clip_range_high": [({}, 0.05)],
    "dual_clip": [({}, 1.01)],
    "kl_coef": [({}, 0.5)],
    "importance_sampling_cap": [({}, 0.9), ({}, None), ({"importance_sampling_cap": 0.9}, None)],
    "p_reset": [({}, 0.5)],
    "importance_sampling_mode": [(CAPPED, mode) for mode in ("token_mask", "sequence_truncate", "sequence_mask")],
}
AGGREGATIONS = ("seq_mean_token_mean", "token_mean")


def at_reference(items):
    return -np.mean([item.sequences[0].advantages[0] for item in items])


def grpo(std_norm="group", agg="seq_mean_token_mean", **knobs) -> Grpo:
    return Grpo(std_norm=std_norm, agg=agg, **knobs)


def advantages(algorithm: Grpo, *groups) -> list[float]:
    items = [item for scores in groups for item in items_of(algorithm, judged([2] * len(scores), scores=scores))]
    prepared = list(algorithm.prepare(items))
    assert all(len(set(item.sequences[0].advantages.tolist())) == 1 for item in prepared)  # the same on every token
    return [float(item.sequences[0].advantages[0]) for item in prepared]


def test_advantages_by_hand():
    assert advantages(grpo(), (1.0, 0.0)) == pytest.approx([0.70711, -0.70711], abs=1e-5)
    assert advantages(grpo(), (1.0, 0.0, 0.0, 0.0)) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages(grpo(std_norm="none"), (1.0, 0.0, 0.0, 0.0)) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_batch_std_is_that_of_all_centred_scores():
    # Centred: +-0.5 and +-1.5; their sum of squares is 5, so the unbiased std is sqrt(5 / 3)
    std = (5 / 3) ** 0.5
    assert advantages(grpo(std_norm="batch"), (11.0, 10.0), (3.0, 0.0)) == pytest.approx(
        [0.5 / std, -0.5 / std, 1.5 / std, -1.5 / std], rel=1e-5
    )
    # With one group it is the group's
    assert advantages(grpo(std_norm="batch"), (1.0, 0.0, 0.0)) == pytest.approx(advantages(grpo(), (1.0, 0.0, 0.0)), rel=1e-5)


@given(
    scores=st.lists(st.integers(-50, 50), min_size=2, max_size=8).filter(lambda s: len(set(s)) > 1),
    scale=st.floats(0.5, 50),
    shift=st.floats(-100, 100),
)
@settings(max_examples=50, deadline=None)
def test_advantages_sum_to_zero_and_do_not_see_scale_or_shift(scores, scale, shift):
    plain = advantages(grpo(), scores)
    assert sum(plain) == pytest.approx(0, abs=1e-4)
    assert advantages(grpo(), [scale * s + shift for s in scores]) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("std_norm", ["group", "batch", "none"])
def test_equal_scores_teach_nothing(std_norm):
    algorithm = grpo(std_norm=std_norm)
    items = list(algorithm.prepare(items_of(algorithm, judged([2, 3], scores=(0.1, 0.1)))))
    items = [single(item.sequences[0].with_(old_logprobs=item.sequences[0].behavior_logprobs)) for item in items]
    loss, gradient, out, _ = evaluate(algorithm, items, [-1.0, -1.2])
    assert loss == 0
    assert gradient.abs().max() == 0
    assert values(out)["zero_advantage"] == 1.0


def test_a_prompt_that_occurs_twice_makes_two_groups():
    algorithm = grpo()
    items = [item for scores in ((1.0, 0.0), (9.0, 5.0)) for item in items_of(algorithm, judged([1, 1], scores=scores))]
    got = [float(item.sequences[0].advantages[0]) for item in algorithm.prepare(items)]
    assert got == pytest.approx([0.70711, -0.70711] * 2, abs=1e-5)


def test_one_response_has_no_baseline():
    assert grpo().items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})


def test_normalisation_and_aggregation_are_always_stated():
    """Neither choice is neutral: the defaults are the paper's, and what is stored of a run names both."""
    assert Grpo().model_dump() | {"std_norm": "group", "agg": "seq_mean_token_mean"} == Grpo().model_dump()
    for knobs in ({"std_norm": "max"}, {"agg": "sum"}):
        with pytest.raises(ValidationError):
            Grpo(**knobs)


def test_on_policy_the_loss_is_minus_the_mean_advantage():
    items = [
        single(sequence(4, old_logprobs=-1.0, behavior_logprobs=-1.0, advantages=1.0)),
        single(sequence(2, old_logprobs=-1.0, behavior_logprobs=-1.0, advantages=-2.0)),
    ]
    by_sequence, gradient, _, _ = evaluate(grpo(), items, [-1.0, -1.0])
    assert by_sequence == pytest.approx(0.5)  # -(1 - 2) / 2
    assert gradient[0].tolist() == pytest.approx([-1.0 / 8] * 4)
    assert gradient[1].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
    by_token, gradient, _, _ = evaluate(grpo(agg="token_mean"), items, [-1.0, -1.0])
    assert by_token == pytest.approx(0.0)  # -(4 * 1 - 2 * 2) / 6
    assert gradient[0].tolist() == pytest.approx([-1.0 / 6] * 4)


def test_value_by_hand():
    # ratios 1.5 (clipped to 1.2) and 1 with A = 1; ratio 0.9 with A = -2
    items = [
        single(
            sequence(2, old_logprobs=[-1.0 - np.log(1.5), -1.0], behavior_logprobs=[-1.0 - np.log(1.5), -1.0], advantages=1.0)
        ),
        single(sequence(1, old_logprobs=-1.0 - np.log(0.9), behavior_logprobs=-1.0 - np.log(0.9), advantages=-2.0)),
    ]
    assert evaluate(grpo(), items, [-1.0, -1.0])[0] == pytest.approx((-1.1 + 1.8) / 2, rel=1e-6)
    assert evaluate(grpo(agg="token_mean"), items, [-1.0, -1.0])[0] == pytest.approx((-1.2 - 1.0 + 1.8) / 3, rel=1e-5)


def test_clipping():
    def one(advantage, log_ratio, **knobs):
        item = single(sequence(1, old_logprobs=-1.0, behavior_logprobs=-1.0, advantages=advantage))
        loss, gradient, out, _ = evaluate(grpo(**knobs), [item], [-1.0 + log_ratio])
        return loss, gradient.item(), values(out)

    high, low = np.log(1.5), np.log(0.5)
    loss, gradient, metrics = one(1.0, high)
    assert (loss, gradient) == (pytest.approx(-1.2), 0.0)
    assert (metrics["clip_high"], metrics["clip_low"]) == (1.0, 0.0)
    loss, gradient, _ = one(-1.0, high)  # a bad token that became likelier is pushed down in full
    assert (loss, gradient) == (pytest.approx(1.5), pytest.approx(1.5))
    loss, gradient, metrics = one(-1.0, low)
    assert (loss, gradient) == (pytest.approx(0.8), 0.0)
    assert (metrics["clip_high"], metrics["clip_low"]) == (0.0, 1.0)
    assert one(1.0, high, clip_range_high=0.6)[0] == pytest.approx(-1.5)
    loss, gradient, _ = one(-1.0, np.log(8.0), dual_clip=3.0)
    assert (loss, gradient) == (pytest.approx(3.0), 0.0)


def test_share_of_clamped_ratios_and_entropy_by_hand():
    item = single(sequence(4, old_logprobs=[-1.0, -2.0, -30.0, -1.0], behavior_logprobs=-1.0, advantages=1.0))
    metrics = values(evaluate(grpo(), [item], [[-1.0, -2.0, -1.0, -20.9]])[2])  # log-ratios 0, 0, 29 and -19.9
    assert metrics["clamped"] == 0.25
    assert metrics["entropy_sampled"] == pytest.approx(34.0 / 4)


def test_kl_at_the_reference_is_zero_and_away_from_it_k3():
    item = single(sequence(2, old_logprobs=-1.0, behavior_logprobs=-1.0, reference_logprobs=-1.0))
    assert evaluate(grpo(kl_coef=0.5), [item], [-1.0])[0] == pytest.approx(0.0)
    # d = 1: exp(-1) - 1 + 1
    assert evaluate(grpo(kl_coef=0.5), [item], [0.0])[0] == pytest.approx(0.5 * 0.36787944, rel=1e-6)
    assert (grpo(kl_coef=0.5).needs.reference, grpo(kl_coef=0.5).reference) == (True, "fixed")
    assert (grpo().needs.reference, grpo().reference) == (False, "none")


def test_sampler_weight_is_capped_and_carries_no_gradient():
    # old_logprobs - behavior_logprobs = log 1.5 and log 5: weights 1.5 and the cap 2
    item = single(sequence(2, old_logprobs=-1.0, behavior_logprobs=[-1.0 - np.log(1.5), -1.0 - np.log(5.0)], advantages=1.0))
    loss, gradient, out, _ = evaluate(grpo(), [item], [-1.0])
    assert loss == pytest.approx(-(1.5 + 2.0) / 2, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.75, -1.0], rel=1e-6)
    assert values(out)["sampler_gap"] == pytest.approx((np.log(1.5) + np.log(5.0)) / 2, rel=1e-6)
    assert values(out)["sampler_capped"] == 0.5
    assert evaluate(grpo(importance_sampling_cap=None), [item], [-1.0])[0] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("mode", "weights", "capped"),
    [
        ("token_truncate", [1.5, 2.0, 0.5], 1 / 3),
        ("token_mask", [1.5, 0.0, 0.5], 1 / 3),
        ("sequence_truncate", [2.0, 2.0, 2.0], 1.0),  # the product is 1.5 * 5 * 0.5
        ("sequence_mask", [0.0, 0.0, 0.0], 1.0),
    ],
)
def test_responses_of_an_older_policy_are_weighted_by_how_probable_they_are_now(mode, weights, capped):
    """The padding of a shorter neighbour takes no part, and the KL term is not weighted."""
    behavior = [-1.0 - np.log(1.5), -1.0 - np.log(5.0), -1.0 - np.log(0.5)]
    stale = single(sequence(3, old_logprobs=-1.0, behavior_logprobs=behavior, advantages=1.0))
    near = single(sequence(1, old_logprobs=-1.0, behavior_logprobs=-1.0, advantages=1.0))
    algorithm = grpo(agg="token_mean", importance_sampling_mode=mode)
    loss, gradient, out, _ = evaluate(algorithm, [stale, near], [-1.0, -1.0])
    assert loss == pytest.approx(-(sum(weights) + 1.0) / 4, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([-w / 4 for w in weights], rel=1e-6)
    assert values(out)["sampler_capped"] == pytest.approx(capped * 3 / 4)
    priced = grpo(agg="token_mean", importance_sampling_mode=mode, kl_coef=0.5)
    with_kl = evaluate(priced, [stale, near], [-1.0, -1.0])[0]
    assert with_kl - loss == pytest.approx(0.5 * (np.exp(1.0) - 2.0), rel=1e-6), "k3 of d = -1, the reference at 0"


def test_truncated_weights_give_the_gradient_of_the_policy_that_training_starts_from():
    """Over all responses that the older policy can give, each as often as it gives it: with no weight the gradient is another one."""
    behavior, old = np.log([0.7, 0.2, 0.1]), np.log([0.5, 0.2, 0.3])
    rewards = np.array([0.0, 1.0, 2.0])

    def gradient(algorithm) -> np.ndarray:
        logits = torch.tensor(old, requires_grad=True)
        total = torch.zeros(())
        for token in range(3):
            item = single(sequence(1, old_logprobs=old[token], behavior_logprobs=behavior[token], advantages=rewards[token]))
            batch = collate([item])
            logprobs = torch.log_softmax(logits, dim=0)[token].float().reshape(1, 1)
            total = total + np.exp(behavior[token]) * algorithm.loss(Outputs(logprobs_BT=logprobs), batch).total
        (found,) = torch.autograd.grad(total, logits)
        return found.numpy()

    probabilities = np.exp(old)
    exact = -probabilities * (rewards - probabilities @ rewards)
    assert gradient(grpo(importance_sampling_cap=4.0)) == pytest.approx(exact, abs=1e-6)
    assert np.abs(gradient(grpo(importance_sampling_cap=None)) - exact).max() > 0.05


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_of_given_advantages_agrees_with_trl(agg, kl):
    rng, lengths = np.random.default_rng(1), (5, 2, 3)

    def draw(n):
        return -1.0 + 0.4 * rng.standard_normal(n)

    algorithm = grpo(agg=agg, kl_coef=kl, clip_range_high=0.28)
    group = judged(lengths, scores=(1.0, -0.5, 0.25))
    items = [
        single(
            item.sequences[0].with_(
                old_logprobs=draw(n).astype("f4"),
                reference_logprobs=draw(n).astype("f4"),
                behavior_logprobs=draw(n).astype("f4"),
            )
        )
        for item, n in zip(algorithm.prepare(items_of(algorithm, group)), lengths, strict=True)
    ]
    rows = [draw(n) for n in lengths]
    loss, gradient, out, batch = evaluate(algorithm, items, rows)
    assert values(out)["clip_high"] + values(out)["clip_low"] > 0  # otherwise clipping is not compared

    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs,
        batch.old_logprobs_BT.double(),
        batch.advantages_BT[:, 0].double(),
        batch.mask_BT,
        agg=agg,
        clip_range_high=0.28,
        reference_logprobs_BT=batch.reference_logprobs_BT.double(),
        kl=kl,
        sampler_weight_BT=(batch.old_logprobs_BT - batch.behavior_logprobs_BT).double().exp().clamp(max=2.0),
    )
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
