"""What policy gradients may have beside their own formula: the likelihood of better responses, and tokens that count by their probability."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, pair, sequence, single, values

from onlinerl import registry
from onlinerl.algorithms._policy_gradient import PolicyGradient
from onlinerl.algorithms.dr_grpo import DrGrpo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.gspo import Gspo
from onlinerl.algorithms.p3o import P3o
from onlinerl.algorithms.reinforce_pp import ReinforcePp
from onlinerl.algorithms.reinforce_pp_baseline import ReinforcePpBaseline
from onlinerl.algorithms.reinforce_scalar import ReinforceScalar
from onlinerl.algorithms.rloo import Rloo
from onlinerl.protocols.algorithm import Algorithm

ALL = {name: registry.load("algorithms", name, Algorithm) for name in registry.names("algorithms")}
FAMILY = [name for name, kind in ALL.items() if issubclass(kind, PolicyGradient)]
PLAIN = {"kl_coef": 0.0}
ADVANTAGES = [
    Grpo(),
    Grpo(agg="token_mean"),
    DrGrpo(max_length=8),
    Gspo(),
    Rloo(**PLAIN),
    ReinforcePp(**PLAIN),
    ReinforcePpBaseline(**PLAIN),
    ReinforceScalar(),
    ReinforceScalar(agg="seq_mean_token_mean"),
]
"""Losses of advantages that items carry."""
by_name = pytest.mark.parametrize("algorithm", ADVANTAGES, ids=lambda a: f"{type(a).__name__}-{a.unit}")

OLD = ([-0.1, -2.3, -0.7, -1.2], [-0.4, -3.0])


def sampled(old, first_token: int = 10, **more):
    return sequence(len(old), first_token, old_logprobs=old, behavior_logprobs=old, **more)


ITEMS = [single(sampled(OLD[0], advantages=1.0)), single(sampled(OLD[1], 50, advantages=-0.5))]
# Where the policy is a little further: no ratio leaves a bound.
ROWS = [[lp + 1e-5 * (t + 1) for t, lp in enumerate(old)] for old in OLD]


@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_has_them(name):
    assert {"online_kl", "nll_coef", "token_weight_alpha"} <= set(ALL[name].model_fields)


# --- the likelihood of better responses ---


@by_name
def test_the_likelihood_of_what_was_better_than_expected_is_a_term(algorithm):
    """As a mean over responses of their mean over tokens, or over all tokens: over the count of all units, as the loss is."""
    plain, priced = (evaluate(algorithm.model_copy(update={"nll_coef": c}), ITEMS, ROWS) for c in (0.0, 2.0))
    nats = -sum(ROWS[0])
    mean = nats / 6 if algorithm.unit == "token" else nats / 4 / 2
    assert priced[0] - plain[0] == pytest.approx(2.0 * mean, rel=1e-6)
    each = -2.0 / 6 if algorithm.unit == "token" else -2.0 / 4 / 2
    assert (priced[1] - plain[1])[0].tolist() == pytest.approx([each] * 4, rel=1e-6)
    assert torch.equal(priced[1][1], plain[1][1]), "nothing of it on the worse response"
    assert values(priced[2])["chosen_nll"] == pytest.approx(nats / 4, rel=1e-6)
    assert "chosen_nll" not in values(plain[2])


def test_it_is_of_tokens_where_advantages_are():
    """As with a critic: the second and the fourth of four."""
    item = single(sampled(OLD[0], advantages=[-1.0, 1.0, 0.0, 0.5]))
    plain, priced = (evaluate(Grpo(nll_coef=c), [item], [OLD[0]]) for c in (0.0, 1.0))
    assert priced[0] - plain[0] == pytest.approx((2.3 + 1.2) / 4)
    assert (priced[1] - plain[1])[0].tolist() == pytest.approx([0.0, -0.25, 0.0, -0.25])


@pytest.mark.parametrize("clip_mode", ["separate", "joint"])
def test_of_two_responses_it_is_that_of_the_better_one(clip_mode):
    item = pair(sampled(OLD[0], score=1.0), sampled(OLD[1], 50, score=3.0))
    plain, priced = (evaluate(P3o(nll_coef=c, clip_mode=clip_mode, **PLAIN), [item], OLD) for c in (0.0, 1.0))
    assert priced[0] - plain[0] == pytest.approx(3.4 / 2)
    assert (priced[1] - plain[1])[0].abs().max() == 0
    assert P3o().loss_at_reference == 0.0
    assert P3o(nll_coef=1.0).loss_at_reference is None


def test_neither_forced_tokens_nor_what_only_the_critic_learns_from_is_imitated():
    forced = single(dataclasses.replace(ITEMS[0].sequences[0], forced=1))
    plain, priced = (evaluate(Grpo(nll_coef=c), [forced], [ROWS[0]]) for c in (0.0, 1.0))
    assert (priced[1] - plain[1])[0].tolist() == pytest.approx([0.0, *[-1 / 3] * 3])
    only_critic = single(dataclasses.replace(ITEMS[0].sequences[0], policy_weight=0.0))
    plain, priced = (evaluate(Grpo(nll_coef=c), [only_critic], [ROWS[0]])[0] for c in (0.0, 1.0))
    assert plain == priced


# --- tokens by their probability ---


@by_name
def test_tokens_count_by_their_probability_before_training(algorithm):
    """1 - alpha + alpha p times the gradient of each token; the value, and what is clipped, stay."""
    alpha = 0.3
    plain, weighed = (evaluate(algorithm.model_copy(update={"token_weight_alpha": a}), ITEMS, ROWS) for a in (0.0, alpha))
    assert weighed[0] == pytest.approx(plain[0], rel=1e-9)
    assert values(weighed[2]) == pytest.approx(values(plain[2]))
    for row, old in enumerate(OLD):
        factors = 1.0 - alpha + alpha * np.exp(np.float32(old))
        assert plain[1][row, : len(old)].abs().min() > 0
        assert weighed[1][row, : len(old)].tolist() == pytest.approx((plain[1][row, : len(old)].numpy() * factors).tolist())


@pytest.mark.parametrize("clip_mode", ["separate", "joint"])
def test_tokens_of_a_pair_do_too(clip_mode):
    item = pair(sampled(OLD[0], score=1.0), sampled(OLD[1], 50, score=3.0))
    plain, weighed = (evaluate(P3o(token_weight_alpha=a, clip_mode=clip_mode, **PLAIN), [item], OLD) for a in (0.0, 1.0))
    assert weighed[0] == pytest.approx(plain[0], abs=1e-9)
    for row, old in enumerate(OLD):
        assert weighed[1][row, : len(old)].tolist() == pytest.approx((plain[1][row, : len(old)].numpy() * np.exp(old)).tolist())


def test_what_is_paid_for_a_kl_does_not_depend_on_it():
    """With no advantage there is nothing but the KL."""
    item = single(sampled(OLD[0], reference_logprobs=-1.5, advantages=0.0))
    both = [
        evaluate(Grpo(kl_coef=0.5, online_kl=0.1, nll_coef=1.0, token_weight_alpha=a), [item], [ROWS[0]]) for a in (0.0, 1.0)
    ]
    assert both[0][1].abs().max() > 0.01
    assert torch.equal(both[0][1], both[1][1])


def test_a_token_that_is_out_of_bounds_is_clipped_as_without():
    item = single(sampled([-1.0, -1.0], advantages=1.0))
    for alpha in (0.0, 0.5):
        _, gradient, out, _ = evaluate(Grpo(token_weight_alpha=alpha), [item], [[-1.0 + math.log(1.3), -1.0]])
        assert gradient[0, 0] == 0
        assert gradient[0, 1] != 0
        assert values(out)["clip_high"] == 0.5
