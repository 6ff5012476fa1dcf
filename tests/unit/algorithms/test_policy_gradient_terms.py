"""What policy gradients may have beside their own formula: the likelihood of better responses, tokens that count by their probability, and bounds
of what responses of another policy count."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, pair, sequence, single, values
from pydantic import ValidationError

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
    common = {"online_kl", "nll_coef", "token_weight_alpha", "importance_sampling_floor", "importance_sampling_filter"}
    assert common <= set(ALL[name].model_fields)


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


# --- bounds of what responses of another policy count ---


def stale(*ratios: float, first_token: int = 10, **more):
    """A response whose tokens are so many times as probable before training as where they were sampled."""
    behavior = [-1.0 - math.log(ratio) for ratio in ratios]
    return sequence(len(ratios), first_token, old_logprobs=-1.0, behavior_logprobs=behavior, **more)


@pytest.mark.parametrize(
    ("mode", "ratios", "weights", "below", "above"),
    [
        ("token_truncate", (0.4, 1.5, 3.0), (0.5, 1.5, 2.0), 1 / 3, 1 / 3),
        ("token_mask", (0.4, 1.5, 3.0), (0.0, 1.5, 0.0), 1 / 3, 1 / 3),
        ("token_mask", (0.6, 1.5, 1.9), (0.6, 1.5, 1.9), 0.0, 0.0),
        ("sequence_truncate", (0.4, 1.5, 3.0), (1.8, 1.8, 1.8), 0.0, 0.0),
        ("sequence_truncate", (0.4, 0.5, 0.5), (0.5, 0.5, 0.5), 1.0, 0.0),
        ("sequence_mask", (0.4, 0.5, 0.5), (0.0, 0.0, 0.0), 1.0, 0.0),
        ("sequence_mask", (2.0, 1.5, 1.5), (0.0, 0.0, 0.0), 0.0, 1.0),
    ],
)
def test_weights_outside_of_a_band_count_as_its_bound_or_not_at_all(mode, ratios, weights, below, above):
    """The band is 0.5 to 2. The loss is divided by all tokens, whatever they count."""
    algorithm = Grpo(importance_sampling_floor=0.5, importance_sampling_mode=mode)
    loss, gradient, out, _ = evaluate(algorithm, [single(stale(*ratios, advantages=1.0))], [-1.0])
    assert loss == pytest.approx(-sum(weights) / 3, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([-w / 3 for w in weights], rel=1e-6)
    assert (values(out)["sampler_floored"], values(out)["sampler_capped"]) == (pytest.approx(below), pytest.approx(above))


def test_without_a_floor_small_weights_are_what_they_are():
    loss, _, out, _ = evaluate(Grpo(), [single(stale(0.01, advantages=1.0))], [-1.0])
    assert loss == pytest.approx(-0.01, rel=1e-6)
    assert values(out)["sampler_floored"] == 0.0


FILTER = {"importance_sampling_filter": (0.5, 1.9)}


def test_a_response_whose_geometric_mean_is_outside_of_the_band_teaches_the_policy_nothing():
    """Ratios 4 and 1: the mean is 2. The other response is in the band and keeps the weights that it has without the filter; both are counted."""
    far, near = single(stale(4.0, 1.0, advantages=1.0)), single(stale(1.5, 0.8, first_token=50, advantages=1.0))
    loss, gradient, out, _ = evaluate(Grpo(**FILTER), [far, near], [-1.0, -1.0])
    assert loss == pytest.approx(-(1.5 + 0.8) / 2 / 2, rel=1e-6)
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].tolist() == pytest.approx([-1.5 / 4, -0.8 / 4], rel=1e-6)
    assert values(out)["sampler_filtered"] == 0.5
    assert "sampler_filtered" not in values(evaluate(Grpo(), [far, near], [-1.0, -1.0])[2])


@pytest.mark.parametrize(("ratio", "kept"), [(1.95, False), (1.85, True), (0.55, True), (0.45, False)])
def test_the_mean_does_not_grow_with_the_length(ratio, kept):
    """Of a product of eight such ratios none would be in the band, and padding has no part in it."""
    items = [single(stale(*[ratio] * 8, advantages=1.0)), single(stale(*[ratio] * 2, first_token=50, advantages=1.0))]
    _, gradient, out, _ = evaluate(Grpo(**FILTER), items, [-1.0, -1.0])
    assert ((gradient[0, 0] != 0).item(), (gradient[1, 0] != 0).item()) == (kept, kept)
    assert values(out)["sampler_filtered"] == (0.0 if kept else 1.0)


def test_it_goes_without_weights_too():
    items = [single(stale(4.0, 1.0, advantages=1.0)), single(stale(1.5, 0.8, first_token=50, advantages=1.0))]
    loss, _, out, _ = evaluate(Grpo(importance_sampling_cap=None, **FILTER), items, [-1.0, -1.0])
    assert loss == pytest.approx(-0.5)
    assert "sampler_capped" not in values(out)


@pytest.mark.parametrize("bounds", [FILTER, {"importance_sampling_mode": "token_mask", "importance_sampling_floor": 0.5}])
def test_what_a_response_costs_in_kl_stays(bounds):
    item = single(stale(4.0, 4.0, advantages=1.0, reference_logprobs=-2.0))
    loss, gradient, _, _ = evaluate(Grpo(kl_coef=0.5, **bounds), [item], [-1.0])
    assert loss == pytest.approx(0.5 * math.exp(-1.0), rel=1e-6), "k3 of d = 1"
    assert gradient.abs().min() > 0


def test_forced_tokens_have_no_part_in_the_mean():
    """Nobody sampled the first one, and no engine has a log-prob of it."""
    item = single(dataclasses.replace(stale(1.0, 3.0, 1.0, advantages=1.0), forced=1))
    item.sequences[0].behavior_logprobs.setflags(write=True)
    item.sequences[0].behavior_logprobs[0] = np.nan
    for band, kept in (((0.5, 1.7), False), ((0.5, 1.8), True)):  # the root of 3 is 1.73
        _, gradient, _, _ = evaluate(Grpo(importance_sampling_filter=band), [item], [-1.0])
        assert (gradient[0, 1] != 0).item() == kept
        assert gradient[0, 0] == 0


@pytest.mark.parametrize("clip_mode", ["separate", "joint"])
@pytest.mark.parametrize("bounds", [FILTER, {"importance_sampling_mode": "sequence_mask", "importance_sampling_floor": 0.5}])
def test_a_pair_of_which_one_response_is_outside_teaches_nothing(clip_mode, bounds):
    ratios = (4.0, 1.0) if "importance_sampling_filter" in bounds else (0.4, 0.9)
    outside = pair(stale(*ratios, score=1.0), stale(1.1, 1.0, first_token=50, score=3.0))
    inside = pair(stale(1.1, 0.9, score=1.0), stale(1.1, 1.0, first_token=50, score=3.0))
    algorithm = P3o(clip_mode=clip_mode, **PLAIN, **bounds)
    assert evaluate(algorithm, [outside], [-1.0, -1.0])[1].abs().max() == 0
    assert evaluate(algorithm, [inside], [-1.0, -1.0])[1].abs().max() > 0


def test_a_filter_has_two_bounds_and_a_floor_is_below_1():
    for knobs in (
        {"importance_sampling_filter": (0.5,)},
        {"importance_sampling_floor": 1.0},
        {"importance_sampling_floor": 0.0},
    ):
        with pytest.raises(ValidationError, match=next(iter(knobs))):
            Grpo(**knobs)
