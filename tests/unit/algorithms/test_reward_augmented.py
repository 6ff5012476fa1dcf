from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from algorithm_batches import F_MINUS, F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, finite_differences, judged, pair
from pydantic import ValidationError

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.reward_augmented import RewardAugmented
from onlinerl.types import Pair, Prompt
from onlinerl.types.plan import Plan

RANGED = {"goals": "score", "score_min": -3.0, "score_max": 3.0}
MODIFIED = {"token_weights": "differing", "nll_coef": 0.3, "nll_target": "reference_answer", "pair_weights": "dcg"}
VARIANTS = [{}, RANGED | {"ties": "keep"}, {"base": "ipo", "ties": "keep"}, {"online_kl": 0.1}, MODIFIED]
THRESHOLDS = {"strength_thresholds": [10.0]}
KNOBS = MARGIN_KNOBS | {
    # Gaps are squares of differences of goals.
    "pair_weights": [(THRESHOLDS if how == "strength" else base, how) for base, how in MARGIN_KNOBS["pair_weights"]],
    "strength_thresholds": [({"pair_weights": "strength"} | THRESHOLDS, [10.0, 40.0])],
    "base": [({}, "ipo"), ({}, "slic")],
    "goal_scale": [({}, 5)],
    "goals": [],  # `score` is refused without a range, and a range without it: see test_goals_by_hand
    "score_min": [(RANGED, -1.0)],
    "score_max": [(RANGED, 1.0)],
    "ties": [({"goal_scale": 2}, "keep")],
    "goal_text": [({}, "Aim for {goal} of {scale}.")],
    "goal_place": [({}, "user")],
}
GROUP = judged([4, 2, 1, 3], scores=(3.0, 2.0, 0.0, 1.0))
PAIRS = [Pair(chosen=0, rejected=2, prob=0.9), Pair(chosen=0, rejected=1, prob=0.7)]


def stops_gradients(algorithm):
    """Weights of samples with `online_kl`."""
    return algorithm.online_kl > 0


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    """The pair once as it is and once the other way round: z and -z."""
    chosen, rejected = ITEM.sequences
    both = [pair(chosen, rejected), pair(rejected, chosen)]
    loss, gradient, _, _ = evaluate(RewardAugmented(), both, [*ROWS, *reversed(ROWS)])
    assert loss == pytest.approx((F_PLUS + F_MINUS) / 2, rel=1e-7)
    slopes = finite_differences(RewardAugmented(), both, [*ROWS, *reversed(ROWS)])
    assert torch.allclose(gradient, slopes, atol=1e-8)


def test_each_pair_is_trained_with_both_goals_and_whole_responses_change_places():
    """Of four responses the best one has goal 10, the second 7, the third 4 and the worst 1."""
    items, dropped = RewardAugmented().items(GROUP, PAIRS)
    found = [[(s.prompt_ids, s.response_ids[0], s.score) for s in item.sequences] for item in items]
    assert found == [
        [((7, 10), 10, 0.0), ((7, 10), 30, -81.0)],
        [((7, 1), 30, 0.0), ((7, 1), 10, -81.0)],
        [((7, 10), 10, 0.0), ((7, 10), 20, -9.0)],
        [((7, 7), 20, 0.0), ((7, 7), 10, -9.0)],
    ]
    assert (dropped, [item.prob for item in items]) == (Counter(), [0.9, 0.9, 0.7, 0.7])
    assert RewardAugmented().most_items(4, 2) == 4


def test_of_one_goal_alone_it_is_its_base():
    items, _ = RewardAugmented().items(GROUP, PAIRS)
    plain, _ = Dpo().items(GROUP, PAIRS)
    assert [[s.response_ids for s in i.sequences] for i in items[::2]] == [[s.response_ids for s in i.sequences] for i in plain]
    one, other = (evaluate(algorithm, [ITEM], ROWS) for algorithm in (RewardAugmented(), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(("ties", "items", "dropped"), [("drop", 2, {"tie": 1}), ("keep", 4, {})])
def test_a_pair_of_one_goal_is_left_out_or_has_both_labels(ties, items, dropped):
    """Goals of 1 and 2: the second best of four is rounded up to the best."""
    made, left_out = RewardAugmented(goal_scale=2, ties=ties).items(GROUP, PAIRS)
    assert (len(made), left_out) == (items, dropped)
    if ties == "keep":
        assert [s.prompt_ids for item in made[2:] for s in item.sequences] == [(7, 2)] * 4
        assert [item.sequences[0].response_ids[0] for item in made[2:]] == [10, 20]


@pytest.mark.parametrize(
    ("knobs", "score", "goal"),
    [
        ({}, 1.0, 4),
        (RANGED, -5.0, 1),
        (RANGED, 0.0, 6),  # half-way, rounded up
        (RANGED, 3.0, 10),
        (RANGED, 99.0, 10),
        ({"goals": "score", "score_min": 1.0, "score_max": 10.0}, 7.0, 7),
    ],
)
def test_goals_by_hand(knobs, score, goal):
    assert RewardAugmented(**knobs).goal(score, [0.0, 1.0, 2.0, 3.0]) == goal


def test_equal_scores_have_the_same_goal():
    """Of (0, 1, 1, 3) the two in the middle are 1.5 of 3 up: 1 + 4.5 + 0.5."""
    assert [RewardAugmented().goal(s, [0.0, 1.0, 1.0, 3.0]) for s in (0.0, 1.0, 3.0)] == [1, 6, 10]


def test_the_samples_of_a_kl_have_the_prompt_that_they_were_sampled_with():
    items, _ = RewardAugmented(online_kl=0.1).items(GROUP, PAIRS[:1])
    assert [[s.prompt_ids for s in item.sequences] for item in items] == [
        [(7, 10), (7, 10), (1, 2), (1, 2)],
        [(7, 1), (7, 1), (1, 2), (1, 2)],
    ]
    assert {item.online for item in items} == {(2, 3)}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"goals": "score"}, "belong together"),
        ({"score_min": 0.0, "score_max": 1.0}, "belong together"),
        ({"goals": "score", "score_max": 1.0}, "belong together"),
        ({"goals": "rank", "score_min": 1.0}, "belong together"),
        ({"goals": "score", "score_min": 1.0, "score_max": 1.0}, "must be above score_min"),
        ({"goal_text": "do well"}, "does not say the goal"),
        ({"base": "cdpo"}, "is Dpo with other knobs"),
    ],
)
def test_what_makes_no_sense_is_refused(knobs, said):
    from onlinerl.errors import ConfigError

    with pytest.raises((ValidationError, ConfigError), match=said):
        RewardAugmented(**knobs)


def test_prompts_without_goals_are_refused():
    from dataclasses import replace

    bare = replace(GROUP, group=replace(GROUP.group, prompt=Prompt(id="p", text="x", token_ids=(1, 2))))
    with pytest.raises(ValueError, match="carries 0 goals"):
        RewardAugmented().items(bare, PAIRS)


def test_whoever_exports_the_model_is_told_what_it_expects():
    (said,) = RewardAugmented(goal_text="aim for {goal}").remarks(Plan(iterations=1, references=(0,)))
    assert "aim for 10" in said
