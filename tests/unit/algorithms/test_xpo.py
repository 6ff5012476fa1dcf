from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, LIST, LIST_ROWS, MARGIN_KNOBS, ROWS, evaluate, judged, pair

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.selm import Selm
from onlinerl.algorithms.xpo import Xpo
from onlinerl.config import component
from onlinerl.protocols.pairing import PairBuilder
from onlinerl.types import Pair

VARIANTS = [
    {},
    {"optimism": 0.3, "length_norm": True, "beta": 2.0},
    {"reference_free": True, "nll_coef": 0.1, "nll_target": "reference_answer"},
]
KNOBS = MARGIN_KNOBS | {"optimism": [({}, 0.1)]}
PLACES = (0, 1)


def of_pair(place: int):
    """ITEM, with one of its two responses from the base model."""
    return pair(*ITEM.sequences, prob=ITEM.prob, exploration=place)


def at_reference(items):
    explored = [item.sequences[item.exploration].behavior_logprobs.sum() for item in items]
    return math.log(2) + 5e-6 * float(sum(explored)) / len(explored)


@pytest.mark.parametrize(("place", "logprob"), [(0, -2.0), (1, -5.0)])
def test_value_by_hand(place, logprob):
    assert evaluate(Xpo(optimism=0.2), [of_pair(place)], ROWS)[0] == pytest.approx(F_PLUS + 0.2 * logprob, rel=1e-7)


@pytest.mark.parametrize("place", PLACES)
def test_without_optimism_it_is_dpo(place):
    ours, theirs = evaluate(Xpo(optimism=0.0), [of_pair(place)], ROWS), evaluate(Dpo(), [ITEM], ROWS)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("place", PLACES)
def test_the_slope_at_the_exploration_response_is_optimism(place):
    """On top of the pair's, at each of its tokens."""
    more = torch.zeros(2, 4, dtype=torch.float64)
    more[place, : len(ITEM.sequences[place].response_ids)] = 0.2
    slopes = evaluate(Xpo(optimism=0.2), [of_pair(place)], ROWS)[1]
    assert torch.allclose(slopes, evaluate(Dpo(), [ITEM], ROWS)[1] + more, atol=1e-12)


def test_gradients_agree_with_those_of_selm_on_the_same_exploration_response():
    third = pair(*ITEM.sequences, LIST.sequences[2], prob=ITEM.prob, exploration=2)
    for item, rows in ((of_pair(0), ROWS), (of_pair(1), ROWS), (third, LIST_ROWS)):
        selm, xpo = Selm(beta=0.3, optimism=0.7), Xpo(beta=0.3, optimism=0.7 * 0.3)
        assert torch.allclose(evaluate(selm, [item], rows)[1], evaluate(xpo, [item], rows)[1], atol=1e-12)


def test_only_pairs_of_the_policy_and_the_base_model_are_trained():
    group = judged([1, 2, 3, 4], {2: "reference", 3: "reference"}, scores=(0.0, 1.0, 2.0, 3.0))
    places = [(1, 0), (3, 2), (2, 0), (3, 1), (1, 2)]
    items, dropped = Xpo().items(group, [Pair(chosen=better, rejected=worse, prob=0.9) for better, worse in places])
    assert [[len(s.response_ids) for s in item.sequences] for item in items] == [[3, 1], [4, 2], [2, 3]]
    assert [item.exploration for item in items] == [0, 0, 1]
    assert dropped == {"same_source": 2}


def test_what_it_needs():
    assert (Xpo().needs.reference_samples, Xpo().needs.beside_samples, Xpo().reference) == (1, ("reference",), "fixed")
    assert Xpo().loss_at_reference is None
    assert Xpo(optimism=0.0).loss_at_reference == pytest.approx(math.log(2))


def test_each_of_several_samples_is_paired_with_the_base_model():
    assert Xpo().needs.pairing == "all_pairs"
    assert (Xpo().most_items(2, 1), Xpo().most_items(5, 10)) == (1, 4)
    group = judged([1, 2, 3, 4], {3: "reference"}, scores=(0.0, 1.0, 3.0, 2.0))
    pairs, _ = component({"name": "all_pairs"}, "pairing", "pairing", PairBuilder).build(group)
    items, dropped = Xpo().items(group, pairs)
    assert sorted(tuple(len(s.response_ids) for s in item.sequences) for item in items) == [(3, 4), (4, 1), (4, 2)]
    assert dropped == {"same_source": 3}
