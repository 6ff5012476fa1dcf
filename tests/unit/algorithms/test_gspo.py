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

from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.gspo import Gspo

VARIANTS = [{}, {"kl_coef": 0.04, "clip_range_low": 0.2, "clip_range_high": 0.28, "importance_sampling_cap": None}]
KNOBS = CLIP_KNOBS | IMPORTANCE_KNOBS | {"kl_coef": [({}, 0.5)]}


def stops_gradients(algorithm):
    """The ratio of a whole response, in that of each token."""
    return True


LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]
GROUP = judged([3, 1, 2], scores=(1.0, -0.5, 0.25))
WIDE = {"clip_range_low": 0.2, "clip_range_high": 0.2}


def at_reference(items):
    return -np.mean([item.sequences[0].advantages[0] for item in items])


def moved(length: int, log_ratios, advantage: float):
    old = -1.0 - np.asarray(log_ratios)
    return single(sequence(length, old_logprobs=old, behavior_logprobs=old, advantages=advantage))


def test_value_by_hand():
    # Ratios 1.21 and 1 of the tokens, so 1.1 of the response, clipped to 1.05, with A = 1; ratio 0.9 of one token with A = -2
    items = [moved(2, [np.log(1.21), 0.0], 1.0), moved(1, [np.log(0.9)], -2.0)]
    algorithm = Gspo(clip_range_low=0.2, clip_range_high=0.05)
    loss, gradient, out, _ = evaluate(algorithm, items, [-1.0, -1.0])
    assert loss == pytest.approx((-1.05 + 1.8) / 2, rel=1e-6)
    assert gradient[0].tolist() == [0.0, 0.0]  # clipped as a whole, though the second token has not moved
    assert gradient[1, 0].item() == pytest.approx(0.9, rel=1e-6)  # 2 s / 2 responses
    assert values(out)["clip_high"] == pytest.approx(2 / 3)


def test_advantages_by_hand():
    items = trained(Gspo(), [judged([1, 2, 1, 1], scores=(1.0, 0.0, 0.0, 0.0))])
    assert [item.sequences[0].advantages[0] for item in items] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate"])
def test_on_policy_the_gradient_is_that_of_grpo(mode):
    """Also where the engine gave other probabilities: each token has its own weight."""
    rows = {"old_logprobs": LOGPROBS, "behavior_logprobs": [[-1.1, -0.9, -1.0], [-0.4], [-2.5, -0.1]]}
    ours, theirs = (kind(importance_sampling_mode=mode) for kind in (Gspo, Grpo))
    got = response_gradients(ours, trained(ours, [GROUP], **rows), LOGPROBS)
    assert got == pytest.approx(response_gradients(theirs, trained(theirs, [GROUP], **rows), LOGPROBS), rel=1e-6)
    assert max(map(abs, got)) > 0.1


def test_of_one_token_it_is_grpo():
    items = [moved(1, [0.3], 1.0), moved(1, [0.1], -1.0)]
    ours, theirs = (evaluate(kind(**WIDE), items, [-1.0, -1.0]) for kind in (Gspo, Grpo))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert torch.allclose(ours[1], theirs[1])


@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_off_policy_the_form_for_tokens_has_value_and_gradient_of_the_form_for_responses(advantage):
    old = torch.tensor([-1.2, -0.6, -1.7], dtype=torch.float64)
    item = single(sequence(3, old_logprobs=old.numpy(), behavior_logprobs=old.numpy(), advantages=advantage))
    loss, gradient, _, batch = evaluate(Gspo(**WIDE), [item], [LOGPROBS[0]])
    logprobs = torch.tensor(LOGPROBS[0], dtype=torch.float64, requires_grad=True)
    s = (logprobs - batch.old_logprobs_BT[0].double()).mean().exp()
    whole = -torch.minimum(s * advantage, s.clamp(0.8, 1.2) * advantage)
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(gradient[0], torch.autograd.grad(whole, logprobs)[0], atol=1e-7)


def test_gradient_by_finite_differences():
    old = [[-1.1, -0.4, -2.1], [-0.35], [-1.9, -0.9]]
    algorithm = Gspo(kl_coef=0.3, clip_range_low=0.2, clip_range_high=0.02)
    rows = {"old_logprobs": old, "behavior_logprobs": old, "reference_logprobs": [[-1.0] * 3, [-1.0], [-1.0] * 2]}
    items = trained(algorithm, [GROUP], **rows)
    _, gradient, out, _ = evaluate(algorithm, items, LOGPROBS)
    assert values(out)["clip_high"] > 0
    assert torch.allclose(gradient, finite_differences(algorithm, items, LOGPROBS), atol=1e-7)


def test_of_given_advantages_agrees_with_trl():
    rng, lengths = np.random.default_rng(1), (5, 2, 3)
    algorithm = Gspo(kl_coef=0.3, clip_range_low=0.02, clip_range_high=0.03)
    drawn = {name: [-1.0 + 0.1 * rng.standard_normal(n) for n in lengths] for name in ("old_logprobs", "reference_logprobs")}
    items = trained(algorithm, [judged(lengths, scores=(1.0, -0.5, 0.25))], behavior_logprobs=drawn["old_logprobs"], **drawn)
    rows = [-1.0 + 0.1 * rng.standard_normal(n) for n in lengths]
    loss, gradient, out, batch = evaluate(algorithm, items, rows)
    assert 0 < values(out)["clip_high"] + values(out)["clip_low"] < 1
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs,
        batch.old_logprobs_BT.double(),
        batch.advantages_BT[:, 0].double(),
        batch.mask_BT,
        agg="seq_mean_token_mean",
        level="sequence",
        clip_range_low=0.02,
        clip_range_high=0.03,
        reference_logprobs_BT=batch.reference_logprobs_BT.double(),
        kl=0.3,
    )
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
