"""What every pair builder promises; a new file under onlinerl/pairing is found and tested by its name."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from math import comb, log

import pytest
from matrix_oracle import Referee

from onlinerl import registry
from onlinerl.config import component
from onlinerl.protocols.pairing import PairBuilder, UncertaintyFilter
from onlinerl.types import Group, Judged, Prompt, Query, Rollout, Sampling, Verdict

# Knobs that let a builder accept pairs on a scale from 0 to 9.
KNOBS = {"floor_margin": {"floor": 2.0, "margin": 1.0}}


@pytest.fixture(params=registry.names("pairing"))
def builder(request):
    """Every pair builder."""
    return component({"name": request.param, **KNOBS.get(request.param, {})}, "pairing", "pairing", PairBuilder)


def judged(texts: list[str], scores: list[float]) -> Judged:
    rollouts = tuple(
        Rollout(
            token_ids=tuple(text.encode()),
            logprobs=(-1.0,) * len(text.encode()),
            text=text,
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(),
            seed=hash_of(text),
        )
        for text in texts
    )
    verdict = Verdict(annotator="a", oracle_version="v", scores=tuple(scores))
    return Judged(group=Group(prompt=Prompt(id="p", text="x", token_ids=(1,)), rollouts=rollouts), verdict=verdict)


def hash_of(text: str) -> int:
    return sum(text.encode())


def described(group: Judged, builder: PairBuilder) -> set[tuple]:
    texts = [rollout.text for rollout in group.group.rollouts]
    pairs, _ = builder.build(group)
    return {(texts[pair.chosen], texts[pair.rejected], round(pair.prob, 9), round(pair.gap, 9)) for pair in pairs}


@pytest.mark.parametrize("count", range(2, 10))
def test_ties_yield_nothing_and_are_counted(builder, count):
    """A constant oracle gives no pairs."""
    pairs, dropped = builder.build(judged([f"text {i}" for i in range(count)], [5.0] * count))
    assert pairs == []
    assert sum(dropped.values()) > 0
    assert set(dropped) == {"tie"}


@pytest.mark.parametrize("count", range(2, 10))
def test_identical_texts_yield_nothing_and_are_counted(builder, count):
    """Whatever an inconsistent oracle says about them."""
    pairs, dropped = builder.build(judged(["same"] * count, [float(i) for i in range(count)]))
    assert pairs == []
    assert set(dropped) == {"identical"}


@pytest.mark.parametrize("count", range(2, 10))
def test_invariant_to_the_order_of_responses(builder, count):
    rng = random.Random(count)
    texts = [f"text {i}" for i in range(count)]
    scores = [float(rng.randrange(0, 10)) for _ in texts]  # ties among them included
    expected = described(judged(texts, scores), builder)
    for _ in range(5):
        order = rng.sample(range(count), count)
        assert described(judged([texts[i] for i in order], [scores[i] for i in order]), builder) == expected


@pytest.mark.parametrize("count", range(2, 10))
def test_accepts_any_group_size_and_orients_pairs(builder, count):
    group = judged([f"text {i}" for i in range(count)], [float(i) for i in range(count)])
    pairs, dropped = builder.build(group)
    if count > 2:  # with two, the better one may be below a builder's floor
        assert pairs
    for pair in pairs:
        assert pair.chosen > pair.rejected
        assert 0.5 < pair.prob <= 1
        assert pair.gap > 0
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs)
    assert all(number > 0 for number in dropped.values())


def compared(texts: list[str]) -> Judged:
    """Judged by an oracle that compares, with scores for the builders that need them."""
    group = judged(texts, [float(text.count("a")) for text in texts]).group
    (verdict,) = Referee().ask([Query(prompt=group.prompt, responses=tuple(texts))])
    return Judged(group=group, verdict=dataclasses.replace(verdict, scores=tuple(float(t.count("a")) for t in texts)))


@pytest.mark.parametrize("place", range(5))
def test_what_was_not_judged_is_in_no_pair(builder, place):
    """The pairs are those of the group without it, and those with it are counted."""
    texts = ["aaaaa", "aaa", "a b", "bb"]
    without = compared(texts)
    texts.insert(place, "dull")
    group = compared(texts)
    pairs, dropped = builder.build(group)
    assert pairs
    assert place not in {index for pair in pairs for index in (pair.chosen, pair.rejected)}
    assert described(group, builder) == described(without, builder)
    if type(builder).__name__ in ("AllPairs", "FloorMargin"):  # the others propose no pair with it
        assert sum(dropped.values()) + len(pairs) == comb(5, 2)
        assert dropped["unknown"] >= 4


def test_a_single_response_yields_nothing(builder):
    assert builder.build(judged(["alone"], [5.0]))[0] == []


def doubted(group: Judged, nats: float) -> Judged:
    """The same group, about each pair of which several judgements disagree by so much."""
    count = len(group.group.rollouts)
    return dataclasses.replace(group, verdict=dataclasses.replace(group.verdict, uncertainty=((nats,) * count,) * count))


def filtering(builder: PairBuilder, **knobs: float) -> PairBuilder:
    return builder.model_copy(update={"uncertainty_filter": UncertaintyFilter(**knobs)})


def many() -> Judged:
    return judged([f"text {i}" for i in range(9)], [float(i) for i in range(9)])


def test_nothing_is_filtered_by_default(builder):
    built, dropped = builder.build(many())
    assert builder.pairs(many()) == (built, Counter(dropped))
    assert builder.pairs(doubted(many(), log(2))) == (built, Counter(dropped))


def test_the_uncertainty_filter_keeps_what_is_certain_and_counts_the_others(builder):
    built, dropped = builder.build(many())
    strict = filtering(builder, mu=1.0, unfiltered=0.0)
    assert strict.pairs(doubted(many(), 0.0)) == (built, Counter(dropped))
    assert strict.pairs(doubted(many(), log(2))) == ([], Counter(dropped) + Counter(uncertain=len(built)))
    assert strict.pairs(many()) == ([], Counter(dropped) + Counter(no_uncertainty=len(built)))
    assert filtering(builder, mu=1.0, unfiltered=1.0).pairs(doubted(many(), log(2))) == (built, Counter(dropped))


def test_what_the_filter_keeps_does_not_depend_on_the_order_of_responses(builder):
    texts, scores, rng = [f"text {i}" for i in range(9)], [float(i) for i in range(9)], random.Random(0)
    half = filtering(builder, mu=1.0)

    def kept(order: list[int]) -> set[tuple[str, str]]:
        group = doubted(judged([texts[i] for i in order], [scores[i] for i in order]), log(2) / 2)
        return {(texts[order[pair.chosen]], texts[order[pair.rejected]]) for pair in half.pairs(group)[0]}

    expected = kept(list(range(9)))
    assert all(kept(rng.sample(range(9), 9)) == expected for _ in range(5))
