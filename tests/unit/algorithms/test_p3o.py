from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from algorithm_batches import (
    PAID_KNOBS,
    RESPONSE_KNOBS,
    evaluate,
    finite_differences,
    judged,
    pair,
    place,
    response_gradients,
    sequence,
    trained,
    values,
)
from pydantic import ValidationError

from onlinerl.algorithms.p3o import P3o
from onlinerl.algorithms.rloo import Rloo

VARIANTS = [{}, {"pairs": "all", "clip_mode": "joint"}, {"kl_coef": 0.0, "importance_sampling_cap": None}]
CAPPED = {"importance_sampling_cap": 0.9}
KNOBS = (
    RESPONSE_KNOBS
    | PAID_KNOBS
    | {
        "kl_coef": [({}, 0.5), ({}, 0.0)],
        "pairs": [({}, "all")],
        "clip_mode": [({}, "joint")],
        "clip_range": [({}, 0.05), ({"clip_mode": "joint"}, 0.05)],
        "importance_sampling_cap": [({}, 0.9), ({}, None), (CAPPED, None)],
        "p_reset": [({}, 0.5)],
        "importance_sampling_mode": [(CAPPED, "sequence_mask")],
    }
)
CLIPS = ("separate", "joint")
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]
SAMPLED = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS}


def stops_gradients(algorithm):
    """The ratio of the other response."""
    return True


def at_reference(items):
    return 0.0


def moved(first, second, gain: float):
    """Two responses whose tokens' ratios are these, at log-probs of -1, the first with a reward higher by `gain`."""
    old = [-1.0 - np.log(np.asarray(ratios)) for ratios in (first, second)]
    one, other = (sequence(len(o), 50 * k, old_logprobs=o, behavior_logprobs=o) for k, o in enumerate(old, 1))
    return pair(one.with_(score=gain), other)


def test_scores_and_what_a_token_pays_may_be_cut_off():
    # 0.5 and -1 nats, of which a token pays for at most 0.25 either way, at 0.1
    s = sequence(2, old_logprobs=-1.0, reference_logprobs=[-1.5, 0.0], score=7.0)
    assert P3o(kl_coef=0.1).reward(s) == pytest.approx(7.0 - 0.1 * (0.5 - 1.0))
    assert P3o(kl_coef=0.1, score_clip=4.0).reward(s) == pytest.approx(4.0 + 0.05)
    assert P3o(kl_coef=0.1, kl_clip=0.75).reward(s) == pytest.approx(7.0 - 0.1 * (0.5 - 0.75))
    assert P3o(kl_coef=0.0, score_clip=4.0).reward(s.with_(reference_logprobs=None)) == 4.0


def test_value_by_hand():
    # rho 1.5 and 0.9, a = 2. Separate: A_1 = 2 * 0.9, clipped: min(2.7, 2.16); A_2 = -2 * 1.5: min(-2.7, -2.7)
    item = moved([1.5, 1.0], [0.9], 2.0)
    loss, gradient, out, _ = evaluate(P3o(), [item], [-1.0, -1.0])
    assert loss == pytest.approx(-0.5 * (2.16 - 2.7), rel=1e-5)
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].tolist() == pytest.approx([1.35, 0.0], rel=1e-6)
    assert values(out)["clip_high"] == pytest.approx(2 / 3)
    # Joint: u = log(1.5 / 0.9) = 0.51, clipped to 0.2; c = 2 * 1.35
    loss, gradient, _, _ = evaluate(P3o(clip_mode="joint"), [item], [-1.0, -1.0])
    assert loss == pytest.approx(-0.5 * 2.7 * 0.2, rel=1e-5)
    assert gradient.abs().max() == 0
    # The worse response became likelier: in full
    loss, gradient, _, _ = evaluate(P3o(clip_mode="joint"), [moved([1.5, 1.0], [0.9], -2.0)], [-1.0, -1.0])
    assert loss == pytest.approx(0.5 * 2.7 * np.log(1.5 / 0.9), rel=1e-5)
    assert gradient.tolist() == pytest.approx(np.array([[1.35, 1.35], [-1.35, 0.0]]), rel=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
def test_where_nothing_is_clipped_the_gradient_is_that_of_the_paper(clip):
    """-1/2 a rho_1 rho_2 (grad S_1 - grad S_2)."""
    item = moved([1.05, 1.02], [0.96], 1.5)
    _, gradient, _, _ = evaluate(P3o(clip_mode=clip), [item], [-1.0, -1.0])
    slope = 0.5 * 1.5 * (1.05 * 1.02) * 0.96
    assert gradient.tolist() == pytest.approx(np.array([[-slope, -slope], [slope, 0.0]]), rel=1e-6)


def test_the_joint_gradient_by_finite_differences_at_the_old_policy():
    """Away from it, the ratios in front are constants of the gradient, and values move otherwise."""
    items = [moved([1.0, 1.0], [1.0], 1.5), moved([1.0], [1.0, 1.0], -0.5)]
    _, gradient, _, _ = evaluate(P3o(clip_mode="joint"), items, [-1.0] * 4)
    assert torch.allclose(gradient, finite_differences(P3o(clip_mode="joint"), items, [-1.0] * 4), atol=1e-4)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("pairs", ["all", "disjoint"])
def test_on_policy_it_is_rloo_of_two_responses(clip, pairs):
    group = judged([3, 1], scores=(1.0, -0.5))
    rows = {name: LOGPROBS[:2] for name in SAMPLED} | {"reference_logprobs": [[-1.0] * 3, [-1.0]]}
    ours, theirs = P3o(clip_mode=clip, pairs=pairs, kl_coef=0.1), Rloo(kl_coef=0.1)
    got = response_gradients(ours, trained(ours, [group], **rows), LOGPROBS[:2])
    assert got == pytest.approx(response_gradients(theirs, trained(theirs, [group], **rows), LOGPROBS[:2]), rel=1e-5)
    # r = 1 - 0.1 * (-0.5), -0.5 - 0.1 * 0.7
    assert got[0] == pytest.approx(-(1.05 + 0.57) / 2, rel=1e-5)


def test_on_policy_all_pairs_of_more_are_rloo_too():
    """The sum over pairs is K / 2 times the sum over advantages: over K (K - 1) / 2 pairs that is the mean over K responses."""
    group = judged([3, 1, 2], scores=(1.0, -0.5, 0.75))
    ours, theirs = P3o(pairs="all", kl_coef=0.0), Rloo(kl_coef=0.0)
    got = response_gradients(ours, trained(ours, [group], **SAMPLED), LOGPROBS)
    assert got == pytest.approx(response_gradients(theirs, trained(theirs, [group], **SAMPLED), LOGPROBS), rel=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_constant_for_each_prompt_changes_nothing(clip):
    algorithm = P3o(clip_mode=clip, pairs="all", kl_coef=0.1)
    rows = {
        "old_logprobs": [[-1.1, -0.5, -1.9], [-0.3], [-1.5, -0.3]],
        "behavior_logprobs": LOGPROBS,
        "reference_logprobs": LOGPROBS,
    }
    plain, shifted = (
        response_gradients(algorithm, trained(algorithm, [judged([3, 1, 2], scores=scores)], **rows), LOGPROBS)
        for scores in ((1.0, -0.5, 0.25), (8.0, 6.5, 7.25))
    )
    assert shifted == pytest.approx(plain, abs=1e-5)
    assert max(map(abs, plain)) > 0.1


def test_pairs_and_what_is_left_out():
    def made(algorithm, group):
        items, dropped = algorithm.items(group, [])
        return [tuple(place(s) for s in item.sequences) for item in items], dict(dropped)

    group = judged([1, 2, 3, 1, 2], scores=(0.0, 2.0, -1.0, 1.0, 5.0))
    assert made(P3o(pairs="disjoint"), group) == ([(0, 1), (2, 3)], {"single": 1})
    pairs, dropped = made(P3o(pairs="all"), group)
    assert (len(pairs), pairs[:2], dropped) == (10, [(0, 1), (0, 2)], {})
    assert [P3o(pairs=p).most_items(5, 0) for p in ("all", "disjoint")] == [10, 2]
    assert P3o().items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})
    two = judged([1, 1], scores=(1.0, 0.0))
    twin = dataclasses.replace(two.group.rollouts[1], token_ids=two.group.rollouts[0].token_ids)
    same = dataclasses.replace(two, group=dataclasses.replace(two.group, rollouts=(two.group.rollouts[0], twin)))
    assert P3o().items(same, []) == ([], {"identical": 1})


def test_rewards_by_hand():
    # Scores 1 and 0; KL 0.5 and -1 nats at 0.1
    rows = {"old_logprobs": [[-1.0, -1.0], [-1.0]], "reference_logprobs": [[-1.2, -1.3], [0.0]]}
    (item,) = trained(P3o(kl_coef=0.1), [judged([2, 1], scores=(1.0, 0.0))], **rows)
    assert [s.score for s in item.sequences] == pytest.approx([0.95, 0.1])
    assert (P3o().needs.kl_in_reward, P3o(kl_coef=0.0).needs.kl_in_reward) == (True, False)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_pair_has_the_weights_of_both_responses(clip):
    # The engine's probabilities: 1.5 times lower, and 2.5 times lower, which is capped at 2
    one = sequence(1, score=1.0, old_logprobs=-1.0, behavior_logprobs=-1.0 - np.log(1.5))
    other = sequence(1, 50, old_logprobs=-1.0, behavior_logprobs=-1.0 - np.log(2.5))
    _, gradient, _, _ = evaluate(P3o(clip_mode=clip), [pair(one, other)], [-1.0, -1.0])
    assert gradient[:, 0].tolist() == pytest.approx([-1.5, 1.5], rel=1e-6)  # 1/2 * 1 * 1.5 * 2
    _, gradient, _, _ = evaluate(
        P3o(clip_mode=clip, importance_sampling_mode="sequence_mask"), [pair(one, other)], [-1.0, -1.0]
    )
    assert gradient.abs().max() == 0
    with pytest.raises(ValidationError):
        P3o(importance_sampling_mode="token_truncate")


@pytest.mark.parametrize("clip", CLIPS)
def test_an_empty_response_still_has_its_reward(clip):
    one = sequence(2, score=1.0, old_logprobs=-1.0, behavior_logprobs=-1.0)
    _, gradient, _, _ = evaluate(P3o(clip_mode=clip), [pair(one, sequence(0, score=3.0))], [-1.0, []])
    assert gradient[0].tolist() == pytest.approx([1.0, 1.0])
