from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import (
    IMPORTANCE_KNOBS,
    evaluate,
    finite_differences,
    judged,
    response_gradients,
    sequence,
    single,
    trained,
    values,
)

from onlinerl.algorithms.reinforce_scalar import ReinforceScalar
from onlinerl.algorithms.rloo import Rloo
from onlinerl.batch import Outputs
from onlinerl.ops.batching import collate

VARIANTS = [
    {},
    {"baseline": "ema", "adv_norm": "std", "kl_coef": 0.1},
    {"baseline": "none", "agg": "seq_mean_token_mean", "importance_sampling_cap": None},
]
KNOBS = IMPORTANCE_KNOBS | {
    "baseline": [({}, "none"), ({}, "loo"), ({}, "batch_mean"), ({}, "ema"), ({"baseline": "ema"}, "batch_mean")],
    "adv_norm": [({}, "std")],
    "agg": [({}, "seq_mean_token_mean")],
    "kl_coef": [({}, 0.5)],
}
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]
SAMPLED = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS}
GROUP = judged([3, 1, 2], scores=(1.0, -0.5, 0.25))


def at_reference(items):
    return -np.mean([s.advantages[0] * s.behavior_logprobs.sum() for item in items for s in item.sequences])


def gains(items) -> list[float]:
    return [float(item.sequences[0].advantages[0]) for item in items]


def of(**knobs) -> ReinforceScalar:
    return ReinforceScalar(**knobs)


def test_value_by_hand():
    # -(1 * (-0.5 - 1.5)) and -(-2 * -1), whatever the old policy said
    items = [single(sequence(2, old_logprobs=-9.0, behavior_logprobs=-9.0, advantages=1.0))]
    items += [single(sequence(1, 50, old_logprobs=-9.0, behavior_logprobs=-9.0, advantages=-2.0))]
    loss, gradient, _, _ = evaluate(of(), items, [[-0.5, -1.5], [-1.0]])
    assert loss == pytest.approx((2.0 - 2.0) / 2)
    assert gradient[0].tolist() == [-0.5, -0.5]
    loss, gradient, _, _ = evaluate(of(agg="seq_mean_token_mean"), items, [[-0.5, -1.5], [-1.0]])
    assert loss == pytest.approx((1.0 - 2.0) / 2)
    assert gradient.tolist() == [[-0.25, -0.25], [1.0, 0.0]]


def test_baselines_by_hand():
    groups = [judged([1, 2, 1], scores=(3.0, 0.0, 0.0)), judged([1, 2, 1], scores=(1.0, 1.0, 1.0))]
    expected = {
        "none": [3.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        "group_mean": [2.0, -1.0, -1.0, 0.0, 0.0, 0.0],
        "loo": [3.0, -1.5, -1.5, 0.0, 0.0, 0.0],
        "batch_mean": [2.0, -1.0, -1.0, 0.0, 0.0, 0.0],
        "ema": [2.0, -1.0, -1.0, 0.0, 0.0, 0.0],  # of the first iteration
    }
    for baseline, wanted in expected.items():
        assert gains(trained(of(baseline=baseline), groups)) == pytest.approx(wanted), baseline


def test_the_running_mean_is_over_earlier_iterations_only():
    algorithm = of(baseline="ema")
    items = [single(sequence(1, score=s, advantages=s)) for s in (4.0, 8.0)]
    assert algorithm.figures(items) == {"score_mean": 6.0}
    assert gains(algorithm.prepare(items, [{"score_mean": 1.0}])) == pytest.approx([3.0, 7.0])
    # 1, an iteration without a step, 2: 0.9 * 1 + 0.1 * 2
    assert gains(algorithm.prepare(items, [{"score_mean": 1.0}, {}, {"score_mean": 2.0}])) == pytest.approx([2.9, 6.9])
    assert gains(of(baseline="batch_mean").prepare(items, [{"score_mean": 1.0}])) == pytest.approx([-2.0, 2.0])
    assert list(algorithm.prepare([])) == []


def test_the_standard_deviation_is_that_of_the_iteration():
    # 2, -1, -1 and 0, 0, 0: squares 6 over 5
    groups = [judged([1, 2, 1], scores=(3.0, 0.0, 0.0)), judged([1, 2, 1], scores=(1.0, 1.0, 1.0))]
    std = (6 / 5) ** 0.5
    assert gains(trained(of(adv_norm="std"), groups)) == pytest.approx([2 / std, -1 / std, -1 / std, 0, 0, 0], abs=1e-5)
    assert gains(trained(of(adv_norm="std"), groups[1:])) == [0.0, 0.0, 0.0]


def test_equal_scores_of_a_group_teach_nothing():
    for baseline in ("group_mean", "loo"):
        algorithm = of(baseline=baseline)
        items = trained(algorithm, [judged([3, 1, 2], scores=(0.1, 0.1, 0.1))], **SAMPLED)
        _, gradient, out, _ = evaluate(algorithm, items, LOGPROBS)
        assert gradient.abs().max() == 0
        assert values(out)["zero_advantage"] == 1.0


def test_on_policy_with_the_mean_of_the_others_it_is_rloo_without_a_kl():
    ours, theirs = of(baseline="loo"), Rloo(kl_coef=0.0)
    got = response_gradients(ours, trained(ours, [GROUP], **SAMPLED), LOGPROBS)
    assert got == pytest.approx(response_gradients(theirs, trained(theirs, [GROUP], **SAMPLED), LOGPROBS), rel=1e-6)
    assert got[0] == pytest.approx(-1.125 / 3)  # 1 - (-0.5 + 0.25) / 2


def test_how_many_responses_it_needs():
    needs = {
        baseline: of(baseline=baseline).needs.min_samples for baseline in ("none", "group_mean", "loo", "batch_mean", "ema")
    }
    assert needs == {"none": 1, "group_mean": 2, "loo": 2, "batch_mean": 1, "ema": 1}
    assert of().items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})
    assert len(of(baseline="none").items(judged([1], scores=(1.0,)), [])[0]) == 1


def test_the_expected_gradient_is_the_same_with_and_without_a_baseline():
    """Over all pairs of responses that a policy of 4 tokens can give, each as often as it gives it."""
    logits = torch.tensor([0.3, -0.4, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    rewards, chance = np.array([0.0, 1.0, 2.0, 5.0]), torch.softmax(logits, dim=0).detach().numpy()

    def expected(baseline: str) -> np.ndarray:
        total = torch.zeros((), dtype=torch.float64)
        algorithm = of(baseline=baseline)
        for i in range(4):
            for j in range(4):
                items, _ = algorithm.items(judged([1, 1], scores=(rewards[i], rewards[j])), [])
                old = (np.log(chance[[k]]).astype("f4") for k in (i, j))
                sampled = [
                    single(it.sequences[0].with_(old_logprobs=o, behavior_logprobs=o)) for it, o in zip(items, old, strict=True)
                ]
                logprobs = torch.log_softmax(logits, dim=0)[[i, j]][:, None]
                loss = algorithm.loss(Outputs(logprobs_BT=logprobs), collate(list(algorithm.prepare(sampled)))).total / 2
                total = total + chance[i] * chance[j] * loss
        return torch.autograd.grad(total, logits)[0].numpy()

    exact = -chance * (rewards - chance @ rewards)
    assert expected("none") == pytest.approx(exact, abs=1e-6)
    assert expected("loo") == pytest.approx(exact, abs=1e-6)
    assert expected("group_mean") == pytest.approx(exact / 2, abs=1e-6)  # (K - 1) / K: it holds the response's own score


def test_gradient_by_finite_differences():
    algorithm = of(kl_coef=0.3)
    rows = {"old_logprobs": LOGPROBS, "behavior_logprobs": [[-1.1, -0.9, -1.0], [-0.4], [-2.5, -0.1]]}
    items = trained(algorithm, [GROUP], reference_logprobs=[[-1.0] * 3, [-1.0], [-1.0] * 2], **rows)
    _, gradient, _, _ = evaluate(algorithm, items, LOGPROBS)
    assert torch.allclose(gradient, finite_differences(algorithm, items, LOGPROBS), atol=1e-7)
