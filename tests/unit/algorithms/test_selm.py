from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, LIST, LIST_ROWS, MARGIN_KNOBS, ROWS, evaluate, judged, values

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.selm import Selm
from onlinerl.ops.batching import collate, plan_step
from onlinerl.types import Pair, TrainItem

VARIANTS = [
    {},
    {"beta": 0.1, "optimism": 0.5},
    {"reference_free": True, "gamma_beta_ratio": 0.4, "length_norm": True, "beta": 2.0},
    {"ld_alpha": 0.5, "beta_rejected": 0.05, "nll_coef": 0.1, "pair_weights": "score_gap"},
    {"token_weights": "differing", "nll_coef": 0.1, "nll_target": "reference_answer"},
]
KNOBS = MARGIN_KNOBS | {"optimism": [({}, 0.1)], "carry_over": [({}, True)]}

# The pair of ITEM with a third response of one token, S = -1 and D = 0.5.
EXPLORING = TrainItem(prompt_id="p", sequences=(*ITEM.sequences, LIST.sequences[2]), prob=ITEM.prob, exploration=2)


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    # f(0.3) + 0.2 * 0.1 * 0.5, and 0.2 * 0.1 * (-1) without a reference, where z = 0.1 (-2 + 5)
    assert evaluate(Selm(beta=0.1, optimism=0.2), [EXPLORING], LIST_ROWS)[0] == pytest.approx(F_PLUS + 0.01, rel=1e-7)
    free = Selm(beta=0.1, optimism=0.2, reference_free=True)
    assert evaluate(free, [EXPLORING], LIST_ROWS)[0] == pytest.approx(F_PLUS - 0.02, rel=1e-7)


def test_without_optimism_it_is_dpo():
    ours, theirs = evaluate(Selm(beta=0.1, optimism=0.0), [EXPLORING], LIST_ROWS), evaluate(Dpo(), [ITEM], ROWS)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1][:2], theirs[1])
    assert ours[1][2].abs().max() == 0


def test_the_slope_at_the_exploration_response_is_optimism_times_beta():
    """At each of its tokens, and nothing at the pair's; and the metric is its log-prob."""
    _, slopes, out, _ = evaluate(Selm(beta=0.1, optimism=0.2), [EXPLORING], LIST_ROWS)
    assert slopes[2].tolist() == pytest.approx([0.02, 0.0, 0.0, 0.0])
    assert torch.equal(slopes[:2], evaluate(Dpo(), [ITEM], ROWS)[1])
    assert values(out)["exploration_logprob"] == pytest.approx(-1.0)


@pytest.mark.parametrize("place", [0, 1])
def test_the_greedy_response_may_be_one_of_the_pair(place):
    item = TrainItem(prompt_id="p", sequences=ITEM.sequences, prob=ITEM.prob, exploration=place)
    ours, plain = evaluate(Selm(beta=0.1, optimism=0.2), [item], ROWS)[1], evaluate(Dpo(), [ITEM], ROWS)[1]
    more = torch.zeros_like(plain)
    more[place, : len(ITEM.sequences[place].response_ids)] = 0.02
    assert torch.allclose(ours, plain + more, atol=1e-12)


def test_a_pair_without_its_exploration_response_is_refused():
    with pytest.raises(ValueError, match="exploration_P"):
        evaluate(Selm(), [ITEM], ROWS)
    with pytest.raises(ValueError, match="exploration_P"):
        evaluate(Selm(), [EXPLORING, ITEM], [*LIST_ROWS, *ROWS])


def test_items_carry_the_greedy_response_once():
    group = judged([1, 2, 3, 4], {3: "greedy"}, scores=(0.0, 1.0, 2.0, 3.0))
    pairs = [Pair(chosen=2, rejected=0, prob=0.9), Pair(chosen=3, rejected=0, prob=0.9), Pair(chosen=1, rejected=3, prob=0.6)]
    items, dropped = Selm().items(group, pairs)
    assert not dropped
    assert [[len(s.response_ids) for s in item.sequences] for item in items] == [[3, 1, 4], [4, 1], [2, 4]]
    assert [item.exploration for item in items] == [2, 0, 1]
    assert collate(items).exploration_P.tolist() == [2, 3, 6]
    assert collate(items).pairs_P2.tolist() == [[0, 1], [3, 4], [5, 6]]


def test_the_three_sequences_are_never_split():
    plan = plan_step([EXPLORING] * 5, 2, 1)
    assert [len(item.sequences) for rank in plan for micro in rank for item in micro] == [3] * 5


@pytest.mark.parametrize("greedy", [{}, {1: "greedy"}], ids=["not sampled", "not judged"])
def test_pairs_without_a_greedy_response_are_left_out_and_counted(greedy):
    group = judged([1, 2, 3], greedy, scores=(0.0, math.nan, 2.0))
    assert Selm().items(group, [Pair(chosen=2, rejected=0, prob=0.9)]) == ([], {"no_greedy": 1})


def test_what_it_needs():
    assert (Selm().needs.greedy, Dpo().needs.greedy) == (True, False)
    assert (Selm().reference, Selm(reference_free=True).reference) == ("previous", "none")
    assert (Selm().needs.beside_samples, Dpo().needs.beside_samples) == (("greedy",), ())
    assert Selm().needs.off_policy == "approximate"
    assert Selm(carry_over=True).needs.beside_samples == ("greedy", "carried", "carried")


def test_what_was_trained_before_may_be_chosen_and_rejected_again():
    group = judged([1, 2, 3, 4], {1: "greedy", 2: "carried", 3: "carried"}, scores=(1.0, 0.5, 2.0, 0.0))
    (item,), dropped = Selm(carry_over=True).items(group, [Pair(chosen=2, rejected=3, prob=0.9)])
    assert not dropped
    assert [(len(s.response_ids), s.source) for s in item.sequences] == [(3, "carried"), (4, "carried"), (2, "greedy")]
    assert item.exploration == 2
