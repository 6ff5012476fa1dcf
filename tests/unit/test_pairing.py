"""Pair builders on small groups with known answers (E1, E2, E5, E11)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from pydantic import ValidationError

from onlinerl.errors import OracleError
from onlinerl.pairing.all_pairs import AllPairs
from onlinerl.pairing.best_rest import BestRest
from onlinerl.pairing.best_worst import BestWorst
from onlinerl.pairing.floor_margin import FloorMargin
from onlinerl.pairing.halves import Halves
from onlinerl.pairing.ranked import Ranked
from onlinerl.pairing.rso import Rso
from onlinerl.protocols.pairing import UncertaintyFilter
from onlinerl.types import Group, Judged, Prompt, Rollout, Sampling, Verdict

NAN = math.nan


def judged(scores=None, preferences=None, texts=None, tokens=None) -> Judged:
    """A group with one response per score or row; texts are r0, r1, ... unless given."""
    count = len(scores if scores is not None else preferences)
    texts = texts or [f"r{i}" for i in range(count)]
    tokens = tokens or [(hash_of(text),) for text in texts]
    rollouts = tuple(
        Rollout(
            token_ids=ids,
            logprobs=(-1.0,) * len(ids),
            text=text,
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(),
            seed=seed,
        )
        for seed, (text, ids) in enumerate(zip(texts, tokens, strict=True))
    )
    verdict = Verdict(annotator="a", oracle_version="v", scores=scores, preferences=preferences)
    return Judged(group=Group(prompt=Prompt(id="p", text="x", token_ids=(1,)), rollouts=rollouts), verdict=verdict)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big")


def indices(pairs) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


# r2 beats everyone by win rate, r0 loses to everyone; both orders as returned, with a position bias of 0.1 for the first shown.
MATRIX = (
    (NAN, 0.4, 0.2, 0.3),
    (0.8, NAN, 0.4, 0.6),
    (1.0, 0.8, NAN, 0.9),
    (0.95, 0.6, 0.3, NAN),
)


class TestBestWorst:
    def test_by_score(self):
        pairs, dropped = BestWorst().build(judged(scores=(0.0, 2.0, -1.0, 1.0)))
        assert indices(pairs) == [(1, 2)]
        assert pairs[0].gap == 3.0
        assert pairs[0].prob == pytest.approx(1 / (1 + math.exp(-3)))
        assert not dropped

    def test_by_win_rate_even_if_there_are_scores(self):
        pairs, _ = BestWorst().build(judged(scores=(9.0, 0.0, 0.0, 0.0), preferences=MATRIX))
        assert indices(pairs) == [(2, 0)]
        assert pairs[0].prob == pytest.approx(0.9)  # (1.0 + 1 - 0.2) / 2
        rates = judged(preferences=MATRIX).verdict.win_rates()
        assert pairs[0].gap == pytest.approx(rates[2] - rates[0], abs=1e-8)

    def test_a_cycle_is_a_tie(self):
        """Rock, paper, scissors: nobody is best."""
        cycle = ((NAN, 0.9, 0.1), (0.1, NAN, 0.9), (0.9, 0.1, NAN))
        assert BestWorst().build(judged(preferences=cycle)) == ([], {"tie": 1})

    def test_min_gap_must_be_exceeded(self):
        group = judged(scores=(0.0, 1.0))
        assert BestWorst(min_gap=1.0).build(group) == ([], {"gap": 1})
        assert indices(BestWorst(min_gap=0.99).build(group)[0]) == [(1, 0)]

    def test_the_best_may_meet_another_one_than_the_worst(self):
        scores = (0.0, 2.0, -1.0, 1.0)
        assert indices(BestWorst(against="second").build(judged(scores=scores))[0]) == [(1, 3)]
        assert BestWorst(against="second").build(judged(scores=(0.0, 2.0, 2.0)))[1] == {"tie": 1}
        found = Counter(
            pair
            for n in range(600)
            for pair in indices(
                BestWorst(against="random").build(judged(scores=scores, texts=[f"{n} {i}" for i in range(4)]))[0]
            )
        )
        assert {*found} == {(1, 0), (1, 2), (1, 3)}
        assert all(abs(times - 200) < 4 * math.sqrt(200 * 2 / 3) for times in found.values()), found

    def test_reasons_for_nothing(self):
        assert BestWorst().build(judged(scores=(1.0, 1.0))) == ([], {"tie": 1})
        assert BestWorst().build(judged(scores=(1.0,))) == ([], {"single": 1})
        assert BestWorst().build(judged(scores=(1.0, 2.0), texts=["x", "x"])) == ([], {"identical": 1})
        assert BestWorst().build(judged(scores=(1.0, 2.0), tokens=[(5,), (5,)])) == ([], {"identical": 1})

    def test_copies_are_not_opponents(self):
        """E11: three copies of the response that r1 loses to must not make r1 the worst."""
        wins = [[0.5] * 5 for _ in range(5)]
        for copy in (2, 3, 4):
            wins[copy][1], wins[1][copy] = 0.6, 0.4  # r1 loses a little to each copy
        wins[1][0], wins[0][1] = 0.7, 0.3  # and beats r0 clearly
        group = judged(preferences=tuple(map(tuple, wins)), texts=["r0", "r1", "copy", "copy", "copy"])
        pairs, _ = BestWorst().build(group)
        assert indices(pairs)[0][1] == 0

    def test_what_was_never_compared_is_not_average(self):
        """A missing judgement is no judgement."""
        matrix = ((NAN, 0.2, NAN), (0.8, NAN, NAN), (NAN, NAN, NAN))
        pairs, _ = BestWorst().build(judged(preferences=matrix))
        assert indices(pairs) == [(1, 0)]
        nothing = tuple((NAN,) * 3 for _ in range(3))
        assert BestWorst().build(judged(preferences=nothing)) == ([], {"unknown": 1})

    def test_an_unknown_pair_is_dropped(self):
        matrix = ((NAN, 0.9, NAN), (0.1, NAN, 0.9), (NAN, 0.1, NAN))  # best and worst never met
        assert BestWorst().build(judged(preferences=matrix)) == ([], {"unknown": 1})

    def test_a_verdict_that_does_not_fit_is_an_error(self):
        group = judged(scores=(1.0, 2.0, 3.0))
        short = Verdict(annotator="a", oracle_version="v", scores=(1.0, 2.0))
        with pytest.raises(OracleError, match=r"judged 2 responses .* which has 3"):
            BestWorst().build(Judged(group=group.group, verdict=short))
        with pytest.raises(OracleError, match="not finite"):
            BestWorst().build(judged(scores=(1.0, NAN)))


class TestAllPairs:
    def test_every_pair_best_gap_first(self):
        pairs, dropped = AllPairs().build(judged(scores=(0.0, 1.0, 3.0)))
        assert indices(pairs) == [(2, 0), (2, 1), (1, 0)]
        assert not dropped

    def test_every_candidate_is_accounted_for(self):
        rng = np.random.default_rng(0)
        for count in range(2, 10):
            scores = tuple(float(s) for s in rng.integers(0, 4, count))
            texts = [f"r{i}" for i in rng.integers(0, 6, count)]
            pairs, dropped = AllPairs(min_gap=1.0, max_pairs=3).build(judged(scores=scores, texts=texts))
            assert len(pairs) + sum(dropped.values()) == comb(count, 2)
            assert len(pairs) <= 3
            assert all(pair.gap > 1.0 for pair in pairs)

    def test_max_pairs_keeps_the_largest_gaps(self):
        pairs, dropped = AllPairs(max_pairs=2).build(judged(scores=(0.0, 1.0, 3.0, 7.0)))
        assert indices(pairs) == [(3, 0), (3, 1)]
        assert dropped == {"max_pairs": 4}


class TestRanked:
    def test_halves_are_paired_rank_by_rank(self):
        pairs, _ = Ranked().build(judged(scores=(1.0, 4.0, 2.0, 3.0)))
        assert indices(pairs) == [(1, 2), (3, 0)]

    @pytest.mark.parametrize("count", range(2, 10))
    def test_each_is_used_once_and_odd_leaves_the_median_out(self, count):
        pairs, _ = Ranked().build(judged(scores=tuple(float(i) for i in range(count))))
        used = [index for pair in indices(pairs) for index in pair]
        assert len(used) == len(set(used)) == count - count % 2
        if count % 2:
            assert count // 2 not in used

    def test_by_win_rate(self):
        pairs, _ = Ranked().build(judged(preferences=MATRIX))
        assert indices(pairs) == [(2, 1), (3, 0)]


class TestHalves:
    """E3: the winner is of the upper half, the loser of the lower one."""

    @pytest.mark.parametrize("count", range(2, 10))
    def test_both_are_drawn_from_their_halves(self, count):
        """Of all that may be drawn nothing is left out and nothing else is among it: not the median, nor two of one half."""
        scores = tuple(float((7 * i) % count if count % 7 else i) for i in range(count))  # in no order
        ranking = sorted(range(count), key=lambda i: -scores[i])
        half = count // 2
        possible = {(better, worse) for better in ranking[:half] for worse in ranking[-half:]}
        group = judged(scores=scores)
        assert set(indices(Halves(draws=half * half).build(group)[0])) == possible
        assert Halves(draws=1000).build(group)[0] == Halves(draws=half * half).build(group)[0]

    def test_one_draw_is_any_of_them_as_often_as_any_other(self):
        """Of 9 pairs, over 900 groups, each within 4 standard deviations of 100: not the first of them, nor always the best against the worst."""
        found = Counter(
            pair
            for n in range(900)
            for pair in indices(
                Halves().build(judged(scores=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0), texts=[f"{n} {i}" for i in range(6)]))[0]
            )
        )
        assert {*found} == {(better, worse) for better in (3, 4, 5) for worse in (0, 1, 2)}
        assert all(abs(times - 100) < 4 * math.sqrt(100 * 8 / 9) for times in found.values()), found


class TestFloorMargin:
    def test_every_kept_pair_satisfies_both(self):
        pairs, dropped = FloorMargin(floor=5.0, margin=2.0).build(judged(scores=(6.0, 5.0, 4.0, 3.0, 1.0)))
        assert sorted(indices(pairs)) == [(0, 2), (0, 3), (0, 4), (1, 3), (1, 4)]
        assert dropped == {"gap": 3, "floor": 2}

    def test_lowering_the_margin_is_monotone(self):
        group = judged(scores=(6.0, 5.5, 5.0, 4.0, 2.0, 1.0))
        kept = [set(indices(FloorMargin(floor=5.0, margin=margin).build(group)[0])) for margin in (0.5, 1.0, 2.0, 4.0)]
        assert kept[0] >= kept[1] >= kept[2] >= kept[3]

    def test_needs_scores(self):
        with pytest.raises(OracleError, match="without scores") as caught:
            FloorMargin(floor=5.0, margin=2.0).build(judged(preferences=MATRIX))
        assert caught.value.field == "pairing.name"


def test_responses_that_begin_alike_are_told_apart():
    start = tuple(range(40))
    one = judged(scores=[1.0, 0.0, 0.5], tokens=[(*start, 1), (*start, 2), (*start, 3)])
    assert indices(BestWorst().build(one)[0]) == [(0, 1)]


def test_responses_of_the_same_tokens_are_one_however_long_they_are():
    start = tuple(range(40))
    pairs, dropped = AllPairs().build(judged(scores=[1.0, 0.0, 0.5], tokens=[(*start, 1), (*start, 1), (*start, 3)]))
    assert len(pairs) == 1
    assert dropped == {"identical": 2}


def test_probabilities_that_scores_imply_cannot_be_written_to():
    """They are handed out more than once."""
    verdict = judged(scores=[1.0, 0.0]).verdict
    with pytest.raises(ValueError, match="read-only"):
        verdict.matrix()[0, 1] = 0.0
    assert verdict.matrix()[0, 1] == pytest.approx(0.7310585786300049)


class TestBestRest:
    def test_the_best_against_each_other_one(self):
        pairs, dropped = BestRest().build(judged(scores=(1.0, 4.0, 2.0, 4.0, 3.5)))
        best = pairs[0].chosen
        assert [(pair.rejected, pair.gap) for pair in pairs] == [(0, 3.0), (2, 2.0), (4, 0.5)]
        assert (best, dropped) in ((1, {"tie": 1}), (3, {"tie": 1}))
        assert {pair.chosen for pair in pairs} == {best}
        assert indices(BestRest(min_gap=1.5).build(judged(scores=(1.0, 4.0, 2.0)))[0]) == [(1, 0), (1, 2)]
        assert indices(BestRest(min_gap=2.5).build(judged(scores=(1.0, 4.0, 2.0)))[0]) == [(1, 0)]

    def test_by_win_rate(self):
        # Symmetrised, r2 wins, then r1 and r3 in the middle, r0 loses: the largest gap comes first.
        pairs, _ = BestRest().build(judged(preferences=MATRIX))
        assert {pair.chosen for pair in pairs} == {2}
        assert pairs[0].rejected == 0
        assert [pair.gap for pair in pairs] == sorted((pair.gap for pair in pairs), reverse=True)


class TestRso:
    SCORES = (0.3, 2.0, 1.1, 0.9, 1.7, 0.1)

    def accepted(self, scores=SCORES, **knobs):
        group = judged(scores=scores)
        return Rso(**knobs).accepted(group, range(len(scores)), scores)

    def test_a_large_beta_accepts_the_first(self):
        assert self.accepted(accept=4, beta=1e9) == [0, 1, 2, 3]

    def test_a_small_beta_accepts_the_best(self):
        assert self.accepted(accept=4, beta=1e-9) == [1, 4, 2, 3]

    @pytest.mark.parametrize("beta", [1e-9, 0.1, 0.5, 5.0])
    def test_the_best_is_always_accepted_and_nothing_twice(self, beta):
        for seed in range(50):
            scores = tuple(np.random.default_rng(seed).standard_normal(6))
            got = self.accepted(scores, accept=6, beta=beta)
            assert sorted(got) == list(range(6))
            # It is accepted in the first walk, so only those whose seeds come before its own are accepted before it.
            best = int(np.argmax(scores))
            assert all(index < best for index in got[: got.index(best)])

    def test_acceptance_in_a_walk_is_in_proportion_to_the_exponential(self):
        """With one to accept beside the best: r = r_max - beta is accepted before it in 1 / e of the groups."""
        hits = 0
        for n in range(2000):
            group = judged(scores=(0.0, 0.5), texts=[f"a{n}", f"b{n}"])
            hits += Rso(accept=2, beta=0.5).accepted(group, (0, 1), (0.0, 0.5))[0] == 0
        assert hits / 2000 == pytest.approx(math.exp(-1), abs=0.04)

    def test_the_accepted_are_paired_as_they_come_the_better_one_first(self):
        builder = Rso(accept=4, beta=1e9)
        assert indices(builder.build(judged(scores=self.SCORES))[0]) == [(1, 0), (2, 3)]
        assert (builder.most(64), builder.most(3)) == (2, 1)

    def test_win_rates_stand_in_for_scores(self):
        pairs, _ = Rso(accept=2, beta=1e-9).build(judged(preferences=MATRIX))
        assert pairs[0].chosen == 2, "the one with the highest win rate is accepted first"
        assert len(pairs) == 1

    def test_knobs_change_what_is_accepted(self):
        few, many = (self.accepted(accept=n, beta=0.5) for n in (2, 4))
        assert (len(few), len(many)) == (2, 4)
        assert self.accepted(accept=4, beta=1e-9) != self.accepted(accept=4, beta=1e9)


class TestUncertaintyFilter:
    """E9."""

    K = 40
    SCORES = tuple(float(k) for k in range(K))

    def group(self, nats: float) -> Judged:
        group = judged(scores=self.SCORES)
        return replace(group, verdict=replace(group.verdict, uncertainty=((nats,) * self.K,) * self.K))

    @pytest.mark.parametrize(
        ("knobs", "share"),
        [
            ({"mu": 1.0}, 0.1 + 0.9 * 0.75),
            ({"mu": 2.0, "unfiltered": 0.0}, 0.5625),
            ({"mu": 0.0}, 1.0),
            ({"within": 0.4}, None),
        ],
    )
    def test_pairs_are_kept_as_often_as_the_formula_says(self, knobs, share):
        """B / log 2 is a quarter: of 780 pairs within three standard deviations. A tenth is kept in any case, by default."""
        group = self.group(math.log(2) / 4)
        built = AllPairs().build(group)[0]
        kept, dropped = AllPairs(uncertainty_filter=UncertaintyFilter(**knobs)).pairs(group)
        assert len(kept) + dropped["uncertain"] == len(built) == comb(self.K, 2)
        if share is None:  # nearer than 0.4 to 1/2: gaps of up to 2
            clear = [pair for pair in built if pair.gap > 2]
            assert [pair for pair in kept if pair.gap > 2] == clear
            share = (len(clear) + 0.1 * (len(built) - len(clear))) / len(built)
        assert len(kept) / len(built) == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / len(built)))

    def test_other_iterations_and_prompts_draw_others(self):
        """Chance is that of the seeds of the responses."""
        half = AllPairs(uncertainty_filter=UncertaintyFilter(mu=1.0))
        group = self.group(math.log(2) / 2)
        later = tuple(replace(rollout, seed=rollout.seed + 1000) for rollout in group.group.rollouts)
        elsewhere = replace(group.group.prompt, id="another")
        others = (replace(group.group, rollouts=later), replace(group.group, prompt=elsewhere))
        kept = [indices(half.pairs(one)[0]) for one in (group, *(replace(group, group=other) for other in others))]
        assert kept[0] == indices(half.pairs(group)[0])
        assert kept[0] != kept[1] != kept[2] != kept[0]

    def test_a_share_of_no_filter_is_refused(self):
        with pytest.raises(ValidationError, match="nothing is filtered"):
            UncertaintyFilter(unfiltered=0.5)
