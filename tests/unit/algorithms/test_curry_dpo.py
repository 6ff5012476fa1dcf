from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, judged, pair, sequence
from pydantic import ValidationError

from onlinerl.algorithms.curry_dpo import CurryDpo
from onlinerl.algorithms.dpo import Dpo
from onlinerl.ops.schedule import schedule, staged
from onlinerl.pairing.best_rest import BestRest
from onlinerl.pairing.best_worst import BestWorst
from onlinerl.types.plan import Plan

VARIANTS = [{}, {"stages": 2}]
KNOBS = MARGIN_KNOBS | {
    "stages": [({}, 1), ({}, 2)],
    "stage_reference": [({}, "iteration")],
    "stage_optimizer_state": [({}, "reset")],
}


def at_reference(items):
    return math.log(2)


def gapped(prompt: str, *gaps: float):
    """Pairs of a prompt whose scores differ by so much."""
    pairs = [pair(sequence(1, score=gap), sequence(1, 50, score=0.0)) for gap in gaps]
    return [replace(each, prompt_id=prompt) for each in pairs]


def test_value_by_hand():
    assert evaluate(CurryDpo(), [ITEM], ROWS)[0] == pytest.approx(F_PLUS, rel=1e-7)


def test_stages_by_hand():
    # Ranked by gap: places 1, 0, 2 of the first prompt, 4, 3 of the second, 5 of the third
    items = [*gapped("a", 2.0, 3.0, 1.0), *gapped("b", 0.5, 9.0), *gapped("c", 0.1)]
    assert CurryDpo().order(items) == [[1, 4, 5], [0, 3], [2]]
    assert CurryDpo(stages=2).order(items) == [[1, 0, 4, 5], [2, 3]]
    assert [sorted(stage) for stage in CurryDpo(stages=1).order(items)] == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("stages", [None, 1, 2, 3, 7])
def test_the_gaps_of_a_prompt_do_not_grow_from_stage_to_stage(stages):
    rng = random.Random(0)
    items = [item for n in range(5) for item in gapped(str(n), *(rng.random() for _ in range(n + 1)))]
    found = CurryDpo(stages=stages).order(items)
    assert sorted(place for stage in found for place in stage) == list(range(15))
    gaps: dict[str, list[list[float]]] = {}
    for stage in found:
        of_prompt: dict[str, list[float]] = {}
        for place in stage:
            of_prompt.setdefault(items[place].prompt_id, []).append(items[place].sequences[0].score)
        for prompt, own in of_prompt.items():
            gaps.setdefault(prompt, []).append(own)
    for own in gaps.values():
        assert all(min(earlier) >= max(later) for earlier, later in pairwise(own))


def test_steps_keep_the_order_of_the_stages():
    stages = staged([[4, 2, 0], [1], [3, 5]], 2, 2, seed=3)
    assert [[len(step) for step in steps] for steps in stages] == [[2, 1, 2, 1], [1, 1], [2, 2]]
    for steps, own in zip(stages, ({0, 2, 4}, {1}, {3, 5}), strict=True):
        assert all({*step} <= own for step in steps)
    assert staged([range(5)], 2, 3, seed=7) == [schedule(5, 2, 3, seed=7)], "a single stage is shuffled as everything else is"


def test_with_two_responses_it_is_dpo():
    group = judged([3, 2], scores=(0.0, 1.0))
    assert BestRest().build(group) == BestWorst().build(group)
    items, _ = CurryDpo().items(group, BestRest().build(group)[0])
    assert CurryDpo().order(items) == [[0]] == [list(stage) for stage in Dpo().order(items)]
    one, other = (evaluate(algorithm, [ITEM], ROWS) for algorithm in (CurryDpo(), Dpo()))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_whose_reference_a_stage_has():
    def asked(**knobs):
        return CurryDpo(**knobs).needs.stage_reference

    assert (asked(), asked(stage_optimizer_state="reset"), asked(stages=2)) == ("keep", "reset", "keep")
    assert (asked(stage_reference="iteration"), asked(stages=1), asked(reference_free=True)) == (None, None, None)
    with pytest.raises(ValidationError, match="only stage_reference=previous_stage reads it"):
        CurryDpo(stage_reference="iteration", stage_optimizer_state="reset")


def test_a_reference_that_only_the_first_stage_would_have_is_refused():
    found = CurryDpo().objection(Plan(iterations=3, references=(0, 0, 0)))
    assert found is not None
    assert (found.field, "previous_stage" in found.cause) == ("algorithm.stage_reference", True)
    assert CurryDpo().objection(Plan(iterations=3, references=(0, 1, 2))) is None
    for knobs in ({"stage_reference": "iteration"}, {"stages": 1}, {"reference_free": True}):
        assert CurryDpo(**knobs).objection(Plan(iterations=3, references=(0, 0, 0))) is None


def test_what_it_asks_for():
    assert (CurryDpo().needs.pairing, CurryDpo().reference, CurryDpo(reference_free=True).reference) == (
        "best_rest",
        "previous",
        "none",
    )
