"""What may go with most losses on pairs: the filter of pairs, and the KL on samples of the policy."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, ROWS, evaluate, finite_differences, judged, pair, sequence, values

from onlinerl import config, registry
from onlinerl.algorithms._modified import PairFilter
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.hypo_online_kl import HypoOnlineKl
from onlinerl.algorithms.orpo import Orpo
from onlinerl.algorithms.rebel import Rebel
from onlinerl.algorithms.reinforce_scalar import ReinforceScalar
from onlinerl.algorithms.simpo import Simpo
from onlinerl.batch import Outputs
from onlinerl.errors import ConfigError
from onlinerl.label_checks import check_labels
from onlinerl.ops.batching import collate
from onlinerl.ops.online_kl import online_kl
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Pair

MODIFIABLE = ("dpo", "ipo", "simpo", "orpo", "rso", "xpo", "re_po", "curry_dpo", "dno_prct", "upo", "optune")
OTHERS = ("grpo", "kto", "irepo", "rebel", "inpo", "tdpo1", "lipo_lambda", "aot", "sppo", "dno", "onpo", "spin", "apo_zero")
GROUP = judged([4, 2, 1], scores=(3.0, 2.0, 0.0))
PAIRS = [Pair(chosen=0, rejected=2, prob=0.9), Pair(chosen=0, rejected=1, prob=0.7), Pair(chosen=1, rejected=2, prob=0.8)]
QUICKSTART = config.load(Path(__file__).parents[3] / "configs/quickstart.yaml", [])
# A third response, of which D = 0.5, and the chosen one once more: D = (2, -1, 0.5), and the samples are the first and the last.
WITH = pair(*ITEM.sequences, sequence(1, 80, reference_logprobs=-1.5), online=(0, 2))


def test_value_by_hand():
    """D of the samples is 2 and 0.5, each the baseline of the other: (1.5 * 2 - 1.5 * 0.5) / 2 = 1.125."""
    loss, gradient, out, _ = evaluate(Dpo(online_kl=0.2), [WITH], (*ROWS, -1.0))
    assert loss == pytest.approx(F_PLUS + 0.2 * 1.125, rel=1e-6)
    assert values(out)["online_kl"] == pytest.approx(1.25)
    alone = evaluate(Dpo(), [ITEM], ROWS)[1]
    assert torch.allclose(gradient[0] - alone[0], torch.full((4,), 0.2 * 1.5 / 2, dtype=torch.float64))
    assert torch.allclose(gradient[1], alone[1])
    assert gradient[2, 0].item() == pytest.approx(0.2 * -1.5 / 2)


def test_the_gradient_is_the_slope_where_weights_are_held():
    """The value moves by sg[D - b] D: finite differences of both together, and of D with the weights where they were, by hand."""
    term = Dpo(online_kl=0.2)
    held = evaluate(term, [WITH], (*ROWS, -1.0))[1] - evaluate(Dpo(), [WITH], (*ROWS, -1.0))[1]
    moving = finite_differences(term, [WITH], (*ROWS, -1.0)) - finite_differences(Dpo(), [WITH], (*ROWS, -1.0))
    # d/dD_1 of ((D_1 - D_2) D_1 + (D_2 - D_1) D_2) / 2 = D_1 - D_2, twice what it is with weights held.
    assert torch.allclose(moving, 2 * held, atol=1e-7)


def test_one_sample_has_no_baseline_and_none_costs_nothing():
    one, none = pair(*ITEM.sequences, online=(0,)), ITEM
    assert evaluate(Dpo(online_kl=0.2), [one], ROWS)[0] == pytest.approx(F_PLUS + 0.2 * 4.0, rel=1e-6)
    assert evaluate(Dpo(online_kl=0.2), [none], ROWS)[0] == pytest.approx(F_PLUS, rel=1e-6)
    assert evaluate(Dpo(online_kl=0.2), [one, none], (*ROWS, *ROWS))[0] == pytest.approx(F_PLUS + 0.1 * 4.0, rel=1e-6)


def test_on_average_over_the_policys_own_samples_the_gradient_is_that_of_the_kl():
    """Exactly, for all groups of three that a policy over three responses of one token can give; the pair is always the same one."""
    logits = torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs, reference = torch.log_softmax(logits, 0), torch.log_softmax(torch.tensor([-0.5, 0.2, 0.4]).double(), 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    responses = [sequence(1, 10 + n, reference_logprobs=float(r)) for n, r in enumerate(reference)]
    estimate = torch.zeros(3, dtype=torch.float64)
    for group in product(range(3), repeat=3):
        item = pair(responses[0], responses[1], responses[2], online=group)
        outputs = Outputs(logprobs_BT=logprobs[:, None])
        loss = Dpo(online_kl=1.0).loss(outputs, collate([item])).total - Dpo().loss(outputs, collate([item])).total
        share = logprobs[list(group)].sum().exp().detach()
        estimate += share * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.allclose(estimate, exact, atol=1e-7)


def test_of_a_policy_gradient_it_is_the_gradient_of_the_kl_of_whole_responses():
    logits = torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs, reference = torch.log_softmax(logits, 0), torch.log_softmax(torch.tensor([-0.5, 0.2, 0.4]).double(), 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for n in range(3):
        now = logprobs[n].item()
        one = sequence(1, 10 + n, reference_logprobs=float(reference[n]), old_logprobs=now, behavior_logprobs=now)
        outputs = Outputs(logprobs_BT=logprobs[n : n + 1, None])
        loss = ReinforceScalar(online_kl=1.0).loss(outputs, collate([pair_of_one(one)])).total
        estimate += logprobs[n].exp().detach() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.allclose(estimate, exact, atol=1e-6)


def pair_of_one(only):
    from algorithm_batches import single

    return single(only)


def test_of_a_policy_gradient_responses_count_by_how_much_likelier_they_became():
    """Twice as likely as when it was sampled: half of it, 4 nats, at twice the price; at most the cap."""
    one = pair_of_one(sequence(2, reference_logprobs=-3.0, old_logprobs=-1.0 - np.log(2) / 2, behavior_logprobs=-1.0))
    plain, priced = (evaluate(ReinforceScalar(**k), [one], [-1.0])[0] for k in ({}, {"online_kl": 0.1}))
    assert priced - plain == pytest.approx(0.1 * 2 * 4.0**2, rel=1e-5)
    capped = {"importance_sampling_cap": 1.5}
    plain, priced = (evaluate(ReinforceScalar(**capped, **k), [one], [-1.0])[0] for k in ({}, {"online_kl": 0.1}))
    assert priced - plain == pytest.approx(0.1 * 1.5 * 4.0**2, rel=1e-5)


def test_hypo_has_the_same_term():
    """Its list of all samples, and a pair of the best and the worst of them with the others beside it."""
    third = sequence(1, 80, reference_logprobs=-1.5)
    best, worst = ITEM.sequences
    listed = pair(best, third, worst)  # best first
    as_pair = pair(best, worst, third, online=(0, 2, 1))
    hypo = evaluate(HypoOnlineKl(beta=0.1, lam=0.3), [listed], (ROWS[0], -1.0, ROWS[1]))
    here = evaluate(Dpo(beta=0.1, online_kl=0.3), [as_pair], (*ROWS, -1.0))
    assert hypo[0] == pytest.approx(here[0], rel=1e-9)
    assert torch.allclose(hypo[1][[0, 2, 1]], here[1], atol=1e-12)


def test_nothing_where_there_is_no_sample():
    assert online_kl(torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0.0, 0.0]


def test_samples_are_the_first_responses_of_the_policy_and_none_is_trained_twice():
    mixed = judged([4, 2, 1, 3], {0: "greedy"}, scores=(3.0, 2.0, 0.0, 1.0))
    (item,), dropped = Dpo(online_kl=0.1).items(mixed, [Pair(chosen=0, rejected=2, prob=0.9)])
    assert [s.response_ids[0] for s in item.sequences] == [10, 30, 20], "chosen, rejected, and the one that is neither"
    assert (item.online, item.is_pair, dropped) == ((2, 1), True, Counter())
    assert [s.response_ids[0] for s in item.compared] == [10, 30]
    batch = collate([item])
    assert (batch.pairs_P2.tolist(), batch.online_PN.tolist()) == ([[0, 1]], [[2, 1]])


@pytest.mark.parametrize(
    ("knobs", "kept", "dropped"),
    [
        ({}, [0, 1, 2], {}),
        ({"margin": 2.0}, [0, 2], {"gap": 1}),
        ({"floor": 2.5}, [0, 1], {"floor": 1}),
        ({"margin": 1.5, "floor": 2.5}, [0], {"gap": 1, "floor": 1}),
    ],
)
def test_pairs_pass_by_their_scores(knobs, kept, dropped):
    made, left_out = Dpo(pair_filter=PairFilter(**knobs)).items(GROUP, PAIRS)
    every = Dpo().items(GROUP, PAIRS)[0]
    assert [[s.response_ids for s in i.sequences] for i in made] == [[s.response_ids for s in every[n].sequences] for n in kept]
    assert left_out == dropped


def test_pairs_pass_by_what_the_reference_prefers():
    """c = -4 - -4 = 0 of the pair, and 3 - 1 = 2 nats more for the other one's loser."""
    other = pair(sequence(1, 20, reference_logprobs=-3.0), sequence(1, 30, reference_logprobs=-1.0))
    for largest, kept, dropped in ((0.0, [0], 1), (1.9, [0], 1), (2.0, [0, 1], 0), (-0.1, [], 2)):
        places, left_out = Dpo(pair_filter=PairFilter(max_reference_margin=largest)).select([ITEM, other])
        assert (list(places), left_out) == (kept, {"reference_margin": dropped})


@pytest.mark.parametrize(("normalized", "dropped"), [(False, 1), (True, 2)])
def test_those_with_the_highest_ches_are_left_out(normalized, dropped):
    items = [
        pair(ITEM.sequences[0].with_(ches=np.array(ches, np.float32)), ITEM.sequences[1])
        for ches in ((0.0, 0.0), (5.0, -1.0), (1.0, 3.0), (-9.0, -9.0))
    ]
    algorithm = Dpo(pair_filter=PairFilter(ches_share=0.25, ches_normalized=normalized))
    assert algorithm.needs.ches
    assert algorithm.select(items) == ([n for n in range(4) if n != dropped], {"ches": 1})
    assert [*algorithm.select(items[:3])[0]] == [0, 1, 2], "a quarter of three is less than one"
    with pytest.raises(ValueError, match=r"sequence\.ches"):
        algorithm.select([ITEM] * 4)


@pytest.mark.parametrize(
    ("algorithm", "field"),
    [
        (Simpo(online_kl=0.1), "algorithm.online_kl"),
        (Orpo(online_kl=0.1), "algorithm.online_kl"),
        (
            Dpo(reference_free=True, pair_filter=PairFilter(max_reference_margin=1.0)),
            "algorithm.pair_filter.max_reference_margin",
        ),
        (Dpo(pair_filter=PairFilter(ches_normalized=False)), "algorithm.pair_filter.ches_normalized"),
        (Dpo(online_kl_samples=3), "algorithm.online_kl_samples"),
    ],
)
def test_what_nothing_measures_or_reads_is_refused(algorithm, field):
    with pytest.raises(ConfigError) as refused:
        check_labels(QUICKSTART, algorithm)
    assert refused.value.field == field


@pytest.mark.parametrize("name", MODIFIABLE)
def test_who_has_them(name):
    fields = registry.load("algorithms", name, Algorithm).model_fields
    assert {"pair_filter", "online_kl", "online_kl_samples"} <= set(fields)


@pytest.mark.parametrize("name", OTHERS)
def test_others_refuse_them_with_the_reason(name):
    from onlinerl.config.roles import build

    keys = ("pair_filter",) if name == "grpo" else ("pair_filter", "online_kl")
    for key in keys:
        with pytest.raises(ConfigError, match=r"of losses .*; \w+ is none of them") as refused:
            build({"name": name, key: {"margin": 1.0} if key == "pair_filter" else 0.1}, "algorithm")
        assert refused.value.field == f"algorithm.{key}"


def test_a_key_of_the_filter_that_there_is_not_is_refused():
    from onlinerl.config.roles import build

    with pytest.raises(ConfigError, match="not a known key") as refused:
        build({"name": "dpo", "pair_filter": {"margn": 1.0}}, "algorithm")
    assert refused.value.field == "algorithm.pair_filter.margn"
    assert refused.value.fix == "did you mean 'margin'?"


def test_with_lag_the_samples_are_of_an_older_policy():
    assert (Dpo().needs.off_policy, Dpo(online_kl=0.1).needs.off_policy) == ("valid", "approximate")
    assert Rebel.model_fields.keys().isdisjoint({"online_kl"})
