from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from algorithm_batches import (
    CLIP_KNOBS,
    PAID_KNOBS,
    RESPONSE_KNOBS,
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
from pydantic import ValidationError
from trl_losses import rloo_loss

from onlinerl.algorithms.dr_grpo import DrGrpo
from onlinerl.algorithms.rloo import Rloo

VARIANTS = [{}, {"kl_coef": 0.0, "importance_sampling_cap": None, "dual_clip": 3.0}]
CAPPED = {"importance_sampling_cap": 0.9}
KNOBS = CLIP_KNOBS | {
    **RESPONSE_KNOBS,
    **PAID_KNOBS,
    "kl_coef": [({}, 0.5), ({}, 0.0)],
    "importance_sampling_cap": [({}, 0.9), ({}, None), (CAPPED, None)],
    "p_reset": [({}, 0.5)],
    "importance_sampling_mode": [(CAPPED, "sequence_mask")],
}
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]
SAMPLED = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS}
GROUP = judged([3, 1, 2], scores=(1.0, -0.5, 0.25))


def at_reference(items):
    return -np.mean([item.sequences[0].advantages[0] for item in items])


def advantages(items) -> list[float]:
    assert all(len(set(item.sequences[0].advantages.tolist())) == 1 for item in items)  # the same on every token
    return [float(item.sequences[0].advantages[0]) for item in items]


def test_value_by_hand():
    # Ratios 1.5 and 0.9 of the tokens, so 1.35 of the response, clipped to 1.2, with A = 1; 1.1 and 1 with A = -1
    items = [
        single(
            sequence(2, old_logprobs=-1.0 - np.log([1.5, 0.9]), behavior_logprobs=-1.0 - np.log([1.5, 0.9]), advantages=1.0)
        ),
        single(
            sequence(
                2, 50, old_logprobs=-1.0 - np.log([1.1, 1.0]), behavior_logprobs=-1.0 - np.log([1.1, 1.0]), advantages=-1.0
            )
        ),
    ]
    loss, gradient, out, _ = evaluate(Rloo(), items, [-1.0, -1.0])
    assert loss == pytest.approx((-1.2 + 1.1) / 2, rel=1e-5)
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].tolist() == pytest.approx([0.55, 0.55], rel=1e-6)  # not divided by the length
    assert values(out)["clip_high"] == 0.5


def test_advantages_by_hand():
    # Scores 1, 0, 2; KL 0.5, -1, 0.2 nats at 0.1 each: rewards 0.95, 0.1, 1.98
    old = [[-1.0, -1.0], [-1.0], [-1.0]]
    reference = [[-1.2, -1.3], [0.0], [-1.2]]
    rows = {"old_logprobs": old, "behavior_logprobs": old, "reference_logprobs": reference}
    items = trained(Rloo(kl_coef=0.1), [judged([2, 1, 1], scores=(1.0, 0.0, 2.0))], **rows)
    assert advantages(items) == pytest.approx([0.95 - 1.04, 0.1 - 1.465, 1.98 - 0.525], abs=1e-6)


def test_scores_and_what_a_token_pays_may_be_cut_off():
    # Scores 1, 0, 2 of which 2 counts 1.2; of the KL 0.2, 0.3, -1 and 0.2 nats each token pays for at most 0.25
    old = [[-1.0, -1.0], [-1.0], [-1.0]]
    rows = {"old_logprobs": old, "behavior_logprobs": old, "reference_logprobs": [[-1.2, -1.3], [0.0], [-1.2]]}
    items = trained(Rloo(kl_coef=0.1, score_clip=1.2, kl_clip=0.25), [judged([2, 1, 1], scores=(1.0, 0.0, 2.0))], **rows)
    r = [1.0 - 0.045, 0.0 + 0.025, 1.2 - 0.02]
    assert advantages(items) == pytest.approx(
        [r[0] - (r[1] + r[2]) / 2, r[1] - (r[0] + r[2]) / 2, r[2] - (r[0] + r[1]) / 2], abs=1e-6
    )


def test_of_two_responses_the_advantage_is_the_difference():
    items = trained(Rloo(kl_coef=0.0), [judged([1, 2], scores=(3.0, 0.5))])
    assert advantages(items) == pytest.approx([2.5, -2.5])


def test_advantages_are_those_of_dr_grpo_times_k_over_k_minus_1():
    group = judged([1, 2, 3, 1], scores=(1.0, -0.5, 0.25, 4.0))
    ours, theirs = (advantages(trained(a, [group])) for a in (Rloo(kl_coef=0.0), DrGrpo()))
    assert ours == pytest.approx([4 / 3 * a for a in theirs], rel=1e-6)


def test_at_the_reference_the_kl_costs_nothing():
    rows = SAMPLED | {"reference_logprobs": LOGPROBS}
    assert advantages(trained(Rloo(kl_coef=0.5), [GROUP], **rows)) == advantages(trained(Rloo(kl_coef=0.0), [GROUP], **rows))


def test_a_constant_for_each_prompt_leaves_the_gradient_unchanged():
    algorithm = Rloo(kl_coef=0.1)
    rows = SAMPLED | {"reference_logprobs": [[-1.0] * 3, [-1.0], [-1.0] * 2]}
    moved = judged([3, 1, 2], scores=(8.0, 6.5, 7.25))
    plain, shifted = (response_gradients(algorithm, trained(algorithm, [g], **rows), LOGPROBS) for g in (GROUP, moved))
    assert shifted == pytest.approx(plain, abs=1e-6)
    assert max(map(abs, plain)) > 0.1


def test_a_response_that_was_left_out_later_is_nobodys_baseline_for_the_kl():
    """`training.on_truncated: drop` leaves it out after the scores were compared, and it has no log-probs."""
    algorithm = Rloo(kl_coef=0.1)
    made, _ = algorithm.items(judged([1, 1, 1], scores=(1.0, 0.0, 5.0)), [])
    filled = [
        single(i.sequences[0].with_(old_logprobs=np.array([-1.0], "f4"), reference_logprobs=np.array([-3.0], "f4")))
        for i in made
    ]
    two = list(algorithm.prepare(filled[:2]))
    assert advantages(two) == pytest.approx([1.0 - 2.5, 0.0 - 3.0])  # both cost 2 nats
    assert advantages(list(algorithm.prepare(filled[:1]))) == pytest.approx([-1.5 - 0.1 * 2.0])


def test_groups_are_told_apart_by_their_prompts():
    algorithm = Rloo(kl_coef=1.0)
    old, reference = [[-1.0], [-1.0]], [[-1.0], [-2.0]]
    group = judged([1, 1], scores=(0.0, 0.0))
    other = dataclasses.replace(
        group, group=dataclasses.replace(group.group, prompt=dataclasses.replace(group.group.prompt, id="q"))
    )
    items = trained(algorithm, [group, other], old_logprobs=old, reference_logprobs=reference)
    assert advantages(items) == pytest.approx([1.0, -1.0, 1.0, -1.0])


def test_the_kl_is_in_the_reward_and_not_in_the_loss():
    item = single(sequence(2, old_logprobs=-1.0, behavior_logprobs=-1.0, reference_logprobs=-2.0, advantages=1.0))
    loss, _, out, _ = evaluate(Rloo(kl_coef=5.0), [item], [-1.0])
    assert loss == pytest.approx(-1.0)
    assert values(out)["kl_reference"] == pytest.approx(np.exp(-1.0))  # k3 of d = 1
    assert (Rloo().needs.kl_in_reward, Rloo(kl_coef=0.0).needs.kl_in_reward) == (True, False)


def test_the_weight_is_that_of_the_response():
    # Engine's probabilities lower by 1.5 and higher by 2: the product is 0.75
    item = single(sequence(2, old_logprobs=-1.0, behavior_logprobs=[-1.0 - np.log(1.5), -1.0 + np.log(2.0)], advantages=1.0))
    loss, gradient, _, _ = evaluate(Rloo(kl_coef=0.0), [item], [-1.0])
    assert loss == pytest.approx(-0.75, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.75, -0.75], rel=1e-6)
    with pytest.raises(ValidationError):
        Rloo(importance_sampling_mode="token_mask")


def test_gradient_by_finite_differences():
    old = [[-1.3, -0.4, -2.2], [-0.35], [-1.9, -0.9]]
    items = trained(Rloo(kl_coef=0.0), [GROUP], old_logprobs=old, behavior_logprobs=LOGPROBS)
    _, gradient, out, _ = evaluate(Rloo(kl_coef=0.0), items, LOGPROBS)
    assert values(out)["clip_high"] > 0
    assert torch.allclose(gradient, finite_differences(Rloo(kl_coef=0.0), items, LOGPROBS), atol=1e-7)


def test_of_given_advantages_agrees_with_trl():
    """The loss; TRL makes advantages where it samples, which cannot be called alone."""
    rng, lengths = np.random.default_rng(2), (5, 2, 3)
    algorithm = Rloo(kl_coef=0.0, clip_range_low=0.05, clip_range_high=0.05)
    old = [-1.0 + 0.4 * rng.standard_normal(n) for n in lengths]
    items = trained(algorithm, [judged(lengths, scores=(1.0, -0.5, 0.25))], old_logprobs=old, behavior_logprobs=old)
    rows = [-1.0 + 0.4 * rng.standard_normal(n) for n in lengths]
    loss, gradient, out, batch = evaluate(algorithm, items, rows)
    assert 0 < values(out)["clip_high"] + values(out)["clip_low"] < 1
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    advantages_B = batch.advantages_BT[:, 0].double()
    expected = rloo_loss(logprobs, batch.old_logprobs_BT.double(), advantages_B, batch.mask_BT, clip_range=0.05)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
