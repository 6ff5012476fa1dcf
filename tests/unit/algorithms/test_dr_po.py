from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, judged, sequence, single, trained
from test_ppo import KNOBS as PPO_KNOBS

from onlinerl.algorithms.dr_po import DrPo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.ppo import Ppo
from onlinerl.batch import Outputs
from onlinerl.ops.batching import collate

BARE = {"normalize_scores": False, "whiten_advantages": False, "kl_coef": 0.0, "lam": 1.0}
VARIANTS = [{"whiten_advantages": False, "normalize_scores": False}, {"mask_value": False, "kl_in": "reward"}, {"p_reset": 0.0}]
KNOBS = {name: cases for name, cases in PPO_KNOBS.items() if name != "missing_eos_score"} | {
    "p_reset": [({}, 0.5)],
    "missing_eos_score": [({}, None)],
    "mask_value": [],  # of responses with forced tokens: see below
}


def at_reference(items):
    tokens = np.concatenate([item.sequences[0].advantages for item in items])
    values = np.concatenate([item.sequences[0].values - item.sequences[0].returns for item in items])
    return -tokens.mean() + 0.1 * (0.5 * values**2).mean()


def stops_gradients(algorithm):
    """What is between the value of k3 and the gradient of k2, with a KL in the loss."""
    return algorithm.kl_coef > 0 and algorithm.kl_in == "loss"


def begun(lengths, prefix, **verdict):
    """A group whose responses begin with these tokens."""
    one = judged(lengths, **verdict)
    rollouts = tuple(replace(rollout, prefix_ids=prefix) for rollout in one.group.rollouts)
    return replace(one, group=replace(one.group, rollouts=rollouts))


def annotated(algorithm, group, **arrays):
    """Its items with these numbers at every token, prepared."""
    items, _ = algorithm.items(group, [])
    filled = [
        replace(
            i, sequences=(i.sequences[0].with_(**{n: np.full(len(i.sequences[0].response_ids), v) for n, v in arrays.items()}),)
        )
        for i in items
    ]
    return list(algorithm.prepare(filled))


NUMBERS = {"old_logprobs": -1.0, "reference_logprobs": -1.0, "values": 0.5}


def test_value_by_hand():
    # Two forced tokens, then two sampled ones; a score of 1 at the last, values of 1/2: A = 1/2, and 1/2 (0 - 1/2)^2 at each sampled token
    algorithm = DrPo(**BARE)
    (item,) = annotated(algorithm, begun([2], (90, 91), scores=(1.0,)), **NUMBERS)
    assert item.sequences[0].prompt_ids == (1, 2, 90, 91)
    assert item.sequences[0].advantages.tolist() == [0.5, 0.5]
    item = single(item.sequences[0].with_(behavior_logprobs=np.full(2, -1.0, np.float32)))
    values = {"values_BT": torch.full((1, 2), 0.5)}
    loss, _, _, _ = evaluate(algorithm, [item], [[-1.0, -1.0]], **values)
    assert loss == pytest.approx(-0.5 + 0.1 * 0.5 * 0.25)


def test_value_by_hand_of_forced_tokens():
    """They have a value loss, and are no actions: the sum over four tokens, divided by two."""
    algorithm = DrPo(**BARE, mask_value=False)
    (item,) = annotated(algorithm, begun([2], (90, 91), scores=(1.0,)), **NUMBERS)
    assert (item.sequences[0].prompt_ids, list(item.sequences[0].response_ids)) == ((1, 2), [90, 91, 10, 11])
    assert np.isnan(item.sequences[0].behavior_logprobs).tolist() == [True, True, False, False]
    assert item.count("token") == 2
    rows, values = [[-3.0, -7.0, -1.0, -1.0]], {"values_BT": torch.full((1, 4), 0.5)}
    loss, gradient, _, _ = evaluate(algorithm, [item], rows, **values)
    assert loss == pytest.approx(-0.5 + 0.1 * 4 * 0.5 * 0.25 / 2)
    assert gradient[0].tolist() == pytest.approx([0.0, 0.0, -0.25, -0.25])


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_log_probs_of_forced_tokens_reach_no_policy_loss(kl_in):
    algorithm = DrPo(mask_value=False, kl_in=kl_in, entropy_coef=0.3)
    items = annotated(algorithm, begun([2, 3], (90,), scores=(1.0, 0.0)), **NUMBERS)
    losses = []
    for forced in (-1.0, -9.0, float("nan")):
        rows = [[forced, -0.8, -1.2], [forced, -1.0, -0.5, -2.0]]
        more = {"values_BT": torch.zeros(2, 4), "entropy_BT": torch.tensor([[forced, 1, 1, 0], [forced, 1, 1, 1]])}
        loss, gradient, _, _ = evaluate(algorithm, items, rows, **more)
        losses.append(loss)
        assert gradient[:, 0].abs().max() == 0
    assert losses[1:] == losses[:1] * 2
    assert np.isfinite(losses[0])


def test_forced_tokens_are_no_part_of_what_advantages_are_whitened_by():
    """Rewards on forced tokens, which differ from those on others, change advantages only through returns: not their mean and variance."""
    algorithm = DrPo(mask_value=False, normalize_scores=False)
    items = annotated(algorithm, begun([2, 3], (90, 91, 92), scores=(1.0, 0.0)), **NUMBERS)
    sampled = np.concatenate([item.sequences[0].advantages[3:] for item in items])
    assert sampled.mean() == pytest.approx(0.0, abs=1e-6)
    assert sampled.var(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_a_response_of_forced_tokens_only_costs_nothing():
    forced = single(sequence(3, old_logprobs=-1.0, forced=3, behavior_logprobs=np.nan, advantages=5.0))
    algorithm = Grpo(kl_coef=0.1)
    batch = collate([forced])
    logprobs = torch.full((1, 3), -1.0, requires_grad=True)
    out = algorithm.loss(Outputs(logprobs_BT=logprobs), batch)
    out.total.backward()
    assert (out.total.item(), logprobs.grad.tolist()) == (0.0, [[0.0] * 3])
    assert batch.sampled_lengths_B.tolist() == [0]


def test_without_resets_it_is_ppo_to_the_last_bit():
    group = judged([2, 3], scores=(1.0, 0.0))
    rows, values = [[-0.8, -1.2], [-1.0, -0.5, -2.0]], {"values_BT": torch.full((2, 3), 0.3)}
    kept = {"old_logprobs": [np.full(n, -1.0) for n in (2, 3)]}
    kept |= dict.fromkeys(("reference_logprobs", "behavior_logprobs", "values"), kept["old_logprobs"])
    expected = evaluate(Ppo(), trained(Ppo(), [group], **kept), rows, **values)
    for mask_value in (True, False):
        algorithm = DrPo(p_reset=0.0, missing_eos_score=None, mask_value=mask_value)
        loss, gradient, _, _ = evaluate(algorithm, trained(algorithm, [group], **kept), rows, **values)
        assert loss == expected[0]
        assert torch.equal(gradient, expected[1])
        assert algorithm.needs == Ppo().needs


def test_any_loss_on_the_policy_s_own_responses_may_begin_with_answers():
    assert (Grpo().needs.prefix, Grpo().needs.answers) == (0.0, False)
    assert (Grpo(p_reset=0.25).needs.prefix, Grpo(p_reset=0.25).needs.answers) == (0.25, True)
    items, _ = Grpo(p_reset=0.25).items(begun([2, 3], (90, 91), scores=(1.0, 0.0)), [])
    assert [item.sequences[0].prompt_ids for item in items] == [(1, 2, 90, 91)] * 2
    assert [item.tokens for item in items] == [6, 7]
