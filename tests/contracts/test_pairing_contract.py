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
# Other ways of those that have some.
MORE = [
    {"name": "best_worst", "against": "second"},
    {"name": "best_worst", "against": "random"},
    {"name": "halves", "draws": 3},
    {"name": "shared_prefix", "choose": "second", "min_prefix": 0},
]


@pytest.fixture(
    params=[*({"name": name, **KNOBS.get(name, {})} for name in registry.names("pairing")), *MORE],
    ids=lambda spec: "-".join(str(value) for value in spec.values() if isinstance(value, str)),
)
def builder(request):
    """Every pair builder."""
    return component(request.param, "pairing", "pairing", PairBuilder)


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


def nearly_even(count: int, prob: float) -> Judged:
    """Judged by an oracle that prefers each response to those before it, and is so sure of it; with scores for the builders that need them."""
    group = judged([f"text {i}" for i in range(count)], [float(i) for i in range(count)])
    said = tuple(tuple(0.5 if i == j else prob if i > j else 1 - prob for j in range(count)) for i in range(count))
    return Judged(group=group.group, verdict=dataclasses.replace(group.verdict, preferences=said))


@pytest.mark.parametrize("count", range(3, 10))
def test_a_near_tie_of_an_oracle_that_compares_is_a_tie(builder, count):
    built, dropped = builder.build(nearly_even(count, 0.519))
    assert built
    assert builder.pairs(nearly_even(count, 0.519)) == ([], Counter(dropped) + Counter(tie=len(built)))
    assert len(builder.pairs(nearly_even(count, 0.52))[0]) == len(built), (
        "as near as the bound is near enough to be one of the two"
    )
    finer = builder.model_copy(update={"tie_within": 0.01})
    assert finer.pairs(nearly_even(count, 0.519)) == (built, Counter(dropped))


def test_scores_that_are_near_each_other_are_no_tie(builder):
    """They have units of their own."""
    group = judged([f"text {i}" for i in range(9)], [4.0 + i / 100 for i in range(9)])
    group = dataclasses.replace(group, verdict=dataclasses.replace(group.verdict, temperature=10.0))
    if type(builder).__name__ == "FloorMargin":
        builder = builder.model_copy(update={"margin": 0.001})
    pairs, _ = builder.pairs(group)
    assert pairs
    assert all(pair.prob < 0.51 for pair in pairs)


def test_soft_ties_are_pairs_that_are_even(builder):
    soft = builder.model_copy(update={"ties": "soft"})
    pairs, dropped = soft.pairs(nearly_even(9, 0.51))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (pair.chosen, pair.rejected) for pair in builder.build(nearly_even(9, 0.51))[0]
    ]
    assert {pair.prob for pair in pairs} == {0.5}
    assert dropped["tie"] == 0
    equal = judged([f"text {i}" for i in range(9)], [5.0] * 9)
    if hasattr(builder, "margin"):  # which a tie does not have
        assert soft.pairs(equal)[0] == []
        return
    assert {(pair.prob, pair.gap) for pair in soft.pairs(equal)[0]} == {(0.5, 0.0)}
    if hasattr(builder, "min_gap"):
        assert soft.model_copy(update={"min_gap": 0.1}).pairs(equal)[0] == [], "nor does it exceed a gap"


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
