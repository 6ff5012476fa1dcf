"""Each prompt selector: what it chooses, worked out by hand, and what it objects to."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from typing import Any, ClassVar

import pytest

from onlinerl.config.roles import build
from onlinerl.errors import ConfigError
from onlinerl.prompts._source import ShuffledPrompts
from onlinerl.selection._draws import drawn, uniform
from onlinerl.types import Message, Pool, Prompt, RawPrompt, SelectionPlan, Visit
from onlinerl.types.selection import content


def prompts(*names: str, **more: Any) -> list[Prompt]:
    return [Prompt(id=name, text=f"the {name}", token_ids=(1,), **more) for name in names]


NAMES = [f"p{n:02d}" for n in range(24)]


def pool(given: list[Prompt], **changes: Any) -> Pool:
    base = Pool(prompts=given, iteration=1, seed=3, per_iteration=4, most=4, reuse=True, asked={}, visits={})
    return dataclasses.replace(base, **changes)


def plan(given: Any, **changes: Any) -> SelectionPlan:
    base = SelectionPlan(prompts=given, iterations=3, seed=3, per_iteration=4, rounds=1, samples_per_prompt=4, reuse=True)
    return dataclasses.replace(base, **changes)


def made(name: str, **knobs: Any) -> Any:
    return build({"name": name, **knobs}, "selection")


def ids(chosen: Any) -> list[str]:
    return [one.prompt_id for one in chosen]


class TestDraws:
    def test_probabilities_are_those_of_what_is_left(self):
        order = drawn({"a": 1.0, "b": 2.0, "c": 5.0}, 3, 0)
        left = {"a": 1.0, "b": 2.0, "c": 5.0}
        for key, probability in order:
            assert probability == pytest.approx(left[key] / sum(left.values()))
            del left[key]
        assert order[-1][1] == 1.0

    def test_the_first_draw_is_in_proportion_to_the_weights(self):
        """Within three sigma, over seeds."""
        weights, seeds = {"a": 1.0, "b": 2.0, "c": 5.0}, 2000
        found = Counter(drawn(weights, 1, seed)[0][0] for seed in range(seeds))
        for key, weight in weights.items():
            p = weight / 8
            assert abs(found[key] - seeds * p) < 3 * math.sqrt(seeds * p * (1 - p))

    def test_so_is_the_second_one_given_the_first(self):
        weights, seeds = {"a": 1.0, "b": 2.0, "c": 5.0}, 2000
        second = Counter(order[1][0] for seed in range(seeds) if (order := drawn(weights, 2, seed))[0][0] == "c")
        n = second.total()
        assert abs(second["b"] - n * 2 / 3) < 3 * math.sqrt(n * 2 / 9)

    def test_a_weight_of_nothing_is_never_drawn(self):
        assert [key for key, _ in drawn({"a": 0.0, "b": 1.0}, 2, 0)] == ["b"]

    def test_a_key_more_moves_no_other(self):
        before = [key for key, _ in drawn(dict.fromkeys(NAMES, 1.0), 24, 5)]
        after = [key for key, _ in drawn(dict.fromkeys([*NAMES, "new"], 1.0), 25, 5)]
        assert [key for key in after if key != "new"] == before

    def test_numbers_are_strictly_between_0_and_1(self):
        assert all(0 < uniform(seed) < 1 for seed in range(1000))


class TestShards:
    def shards(self, given: list[Prompt], count: int = 3) -> list[list[str]]:
        return [
            ids(made("shards", shards=count).select(pool(given, iteration=t, most=len(given)))) for t in range(1, count + 1)
        ]

    def test_they_are_disjoint_and_together_they_are_all(self):
        first, second, third = self.shards(prompts(*NAMES))
        assert sorted([*first, *second, *third]) == NAMES
        assert min(map(len, (first, second, third))) > 2

    def test_adding_prompts_never_moves_old_ones(self):
        before, after = self.shards(prompts(*NAMES)), self.shards(prompts(*NAMES, *(f"new{n}" for n in range(9))))
        assert [[i for i in shard if i in NAMES] for shard in after] == before

    def test_an_iteration_that_is_done_again_takes_the_same_shard_in_the_same_order(self):
        """Whatever the run has sampled since, of other shards."""
        given = prompts(*NAMES)
        first, second, _ = self.shards(given)
        again = made("shards").select(pool(given, iteration=2, most=24, asked=dict.fromkeys(first, 1)))
        assert ids(again) == second

    def test_the_first_shard_comes_again_with_what_was_sampled_least(self):
        given = prompts(*NAMES)
        first = self.shards(given)[0]
        again = ids(made("shards").select(pool(given, iteration=4, most=24, asked=dict.fromkeys(first[:2], 1))))
        assert again == [*first[2:], *first[:2]]

    def test_a_prompt_that_is_there_twice_is_taken_once(self):
        twice = [*prompts(*NAMES), dataclasses.replace(prompts("p03")[0], id="again")]
        taken = [i for shard in self.shards(twice) for i in shard]
        assert sorted(taken) == sorted([*(name for name in NAMES if name != "p03"), "again"])  # the first of the two by its id

    def test_what_is_asked_is_the_same_before_and_after_it_is_rendered(self):
        said = (Message(role="user", content="Hello"),)
        raw, rendered = RawPrompt(id="a", messages=said), Prompt(id="b", text="<user>Hello", token_ids=(1,), messages=said)
        assert content(raw) == content(rendered)
        assert content(RawPrompt(id="a", text="Hello")) == content(Prompt(id="b", text="Hello", token_ids=(1,))) == "Hello"

    @pytest.mark.parametrize(
        ("knobs", "changes", "field", "cause"),
        [
            ({"shards": 2}, {"reuse": False}, "selection.shards", "is 2, and 3 iterations take one each"),
            ({"shards": 3}, {"per_iteration": 12}, "prompts.per_iteration", "the smallest of 3 shards holds"),
            ({"shards": 90}, {"iterations": 90}, "prompts.per_iteration", "the smallest of 90 shards holds 0 prompts"),
        ],
    )
    def test_what_cannot_work(self, knobs, changes, field, cause):
        found = made("shards", **knobs).objection(plan(prompts(*NAMES), **changes))
        assert found.field == field
        assert cause in found.cause
        assert found.fix

    def test_only_shards_that_are_used_must_be_large_enough(self):
        for seed in range(9):
            drawn_at = [made("shards").select(pool(prompts(*NAMES), seed=seed, iteration=t, most=24)) for t in (1, 2, 3)]
            first, *others = map(len, drawn_at)
            objected = [
                made("shards").objection(plan(prompts(*NAMES), seed=seed, per_iteration=first, iterations=iterations))
                for iterations in (1, 3)
            ]
            assert [one is not None for one in objected] == [False, min(others) < first]


class TestMix:
    GIVEN: ClassVar = [
        *prompts(*(f"m{n:03d}" for n in range(400)), source="math"),
        *prompts(*(f"c{n:03d}" for n in range(400)), source="code"),
        *prompts(*(f"t{n:03d}" for n in range(400)), source="talk"),
    ]

    def test_shares_are_those_of_the_weights_within_three_sigma(self):
        weights, n = {"math": 5.0, "code": 3.0, "talk": 2.0}, 400
        chosen = made("mix", weights=weights).select(pool(self.GIVEN, per_iteration=n, most=n))
        found = Counter(one.prompt_id[0] for one in chosen)
        for source, weight in weights.items():
            p = weight / 10
            assert abs(found[source[0]] - n * p) < 3 * math.sqrt(n * p * (1 - p))

    def test_a_source_without_weight_is_left_out(self):
        weights = {"math": 1.0, "code": 0.0, "talk": 1.0}
        assert {i[0] for i in ids(made("mix", weights=weights).select(pool(self.GIVEN, most=100)))} == {"m", "t"}

    def test_a_small_source_is_not_repeated_more_often_than_allowed(self):
        """Its share goes to the others then."""
        given = [*prompts("s0", "s1", source="small"), *prompts(*NAMES, source="large")]
        mix = made("mix", weights={"small": 9.0, "large": 1.0}, max_visits=2)
        asked: Counter[str] = Counter()
        for iteration in range(1, 6):
            asked.update(ids(mix.select(pool(given, iteration=iteration, asked=dict(asked)))))
        assert asked["s0"] == asked["s1"] == 2
        assert asked.total() == 20

    def test_without_replacement_until_a_source_is_exhausted(self):
        given = prompts(*NAMES, source="one")
        mix, asked = made("mix", weights={"one": 1.0}), Counter[str]()
        for iteration in range(1, 7):
            asked.update(ids(mix.select(pool(given, iteration=iteration, asked=dict(asked)))))
        assert set(asked.values()) == {1}

    def test_probability_is_that_of_the_source_and_then_of_the_prompt(self):
        given = [*prompts("a0", source="a"), *prompts("b0", "b1", source="b")]
        chosen = made("mix", weights={"a": 1.0, "b": 3.0}).select(pool(given, per_iteration=3, most=3))
        left = {"a": 1, "b": 2}
        for one in chosen:
            share = {s: {"a": 1.0, "b": 3.0}[s] for s in left if left[s]}
            source = one.prompt_id[0]
            assert one.probability == pytest.approx(share[source] / sum(share.values()) / left[source])
            assert one.reason == f"source {source}"
            left[source] -= 1

    @pytest.mark.parametrize(
        ("knobs", "changes", "field", "cause"),
        [
            ({"weights": {"math": 1.0, "cod": 1.0}}, {}, "selection.weights", "names the source 'cod'"),
            ({"weights": {"math": 1.0, "code": 1.0}}, {}, "selection.weights", "400 training prompts of the source 'talk'"),
            (
                {"weights": {"math": 1.0, "code": 0.0, "talk": 0.0}},
                {"per_iteration": 300},
                "selection.max_visits",
                "each sampled at most 2 times, may need 600, and sources with a weight hold 400",
            ),
            (
                {"weights": {"math": 1.0, "code": 0.0, "talk": 0.0}},
                {"per_iteration": 200, "reuse": False},
                "selection.weights",
                "each sampled at most once, may need 600",
            ),
            (
                {"weights": {"math": 1.0, "code": 0.0, "talk": 0.0}},
                {"per_iteration": 500, "iterations": 1},
                "selection.weights",
                "may need 500",
            ),
            (
                {"weights": {"math": 1.0, "code": 0.0, "talk": 0.0}},
                {"per_iteration": 110, "rounds": 3},
                "selection.max_visits",
                "3 iterations of up to 3 rounds of 110 prompts, each sampled at most 2 times, may need 440",
            ),
        ],
    )
    def test_what_cannot_work(self, knobs, changes, field, cause):
        found = made("mix", **knobs).objection(plan(self.GIVEN, **changes))
        assert found.field == field
        assert cause in found.cause
        assert found.fix

    def test_what_it_does_not_object_to_never_runs_dry(self):
        """A source that comes often is used up first, and then the others must hold enough different prompts."""
        rng = random.Random(0)
        dry = refused = 0
        for seed in range(60):
            sizes = {"a": rng.randint(1, 6), "b": rng.randint(1, 6)}
            given = [p for source, n in sizes.items() for p in prompts(*(f"{source}{i}" for i in range(n)), source=source)]
            mix = made("mix", weights={"a": 9.0, "b": 1.0}, max_visits=rng.randint(1, 3))
            planned = plan(given, per_iteration=rng.randint(1, 6), iterations=rng.randint(1, 5))
            n, asked, got = planned.per_iteration, Counter[str](), []
            for iteration in range(1, planned.iterations + 1):
                some = pool(given, iteration=iteration, seed=seed, asked=dict(asked), per_iteration=n, most=n)
                got.append(ids(mix.select(some)))
                asked.update(got[-1])
            refused += mix.objection(planned) is not None
            dry += any(len(each) < n for each in got)
            assert mix.objection(planned) is not None or all(len(each) == n for each in got)
        assert 0 < dry <= refused < 60

    @pytest.mark.parametrize("weights", [{}, {"math": 0.0}, {"math": -1.0}])
    def test_weights_that_are_none_are_refused(self, weights):
        with pytest.raises(ConfigError, match=r"selection\.weights"):
            made("mix", weights=weights)


class TestVariance:
    VISITS: ClassVar = {
        "flat": Visit(iteration=1, scores=(0.5, 0.5, 0.5, 0.5)),
        "half": Visit(iteration=1, scores=(0.0, 0.0, 1.0, 1.0)),
        "rare": Visit(iteration=1, scores=(0.0, 0.0, 0.0, 1.0)),
    }

    def weights(
        self, *, iteration: int = 2, names: tuple[str, ...] = ("flat", "half", "rare"), **knobs: Any
    ) -> dict[str, float]:
        """What each weighs, seen from the probability of being drawn first."""
        selector, found, given = made("variance", **knobs), {}, prompts(*names)
        for seed in range(200):
            first = selector.select(pool(given, iteration=iteration, seed=seed, per_iteration=1, most=1, visits=self.VISITS))[0]
            found[first.prompt_id] = first.probability
        assert {*found} == {*names}, "not every prompt came first"
        assert sum(found.values()) == pytest.approx(1)
        return found

    def expected(self, **weights: float) -> dict[str, Any]:
        return {name: pytest.approx(weight / sum(weights.values())) for name, weight in weights.items()}

    def test_std_by_hand(self):
        decayed = {name: 0.9 * std + 0.05 for name, std in {"flat": 0.0, "half": 0.5, "rare": math.sqrt(3) / 4}.items()}
        assert self.weights() == self.expected(**decayed)

    def test_pass_rate_by_hand(self):
        decayed = {"flat": 0.05, "half": 0.9 * 0.25 + 0.05, "rare": 0.9 * 3 / 16 + 0.05}
        assert self.weights(priority="pass_rate", pass_score=0.6) == self.expected(**decayed)
        assert self.weights(priority="pass_rate", pass_score=0.5) == self.expected(**decayed)  # all that is flat passes

    def test_positive_variance_by_hand(self):
        decayed = {"flat": 0.05, "half": 0.9 * (2 * 0.25) / 4 + 0.05, "rare": 0.9 * 0.5625 / 4 + 0.05}
        assert self.weights(priority="positive_variance") == self.expected(**decayed)

    def test_age_eps_and_decay(self):
        assert self.weights(iteration=4, decay=0.5, eps=0.2) == self.expected(
            flat=0.2, half=0.125 * 0.5 + 0.2, rare=0.125 * math.sqrt(3) / 4 + 0.2
        )

    def test_noise_of_the_oracle_is_subtracted(self):
        """Of a variance of 0.25 it gives 0.16 * 3/4 = 0.12, and of 3/16 the same; of the positive side half of that."""
        assert self.weights(noise_std=0.4) == self.expected(
            flat=0.05, half=0.9 * math.sqrt(0.13) + 0.05, rare=0.9 * math.sqrt(3 / 16 - 0.12) + 0.05
        )
        assert self.weights(noise_std=0.4, priority="positive_variance") == self.expected(
            flat=0.05, half=0.9 * (0.125 - 0.06) + 0.05, rare=0.9 * (0.5625 / 4 - 0.06) + 0.05
        )
        assert self.weights(noise_std=5.0) == self.expected(flat=0.05, half=0.05, rare=0.05)

    def test_one_that_was_never_judged_has_the_highest_priority(self):
        found = self.weights(names=("flat", "half", "new"))
        assert found["new"] == found["half"] > found["flat"]

    def test_before_anything_was_judged_all_weigh_the_same(self):
        chosen = made("variance").select(pool(prompts(*NAMES)))
        assert [one.probability for one in chosen] == pytest.approx([1 / 24, 1 / 23, 1 / 22, 1 / 21])
        assert {one.reason for one in chosen} == {"new"}

    def test_the_reason_says_what_is_known(self):
        chosen = made("variance").select(pool(prompts("half"), iteration=3, per_iteration=1, most=1, visits=self.VISITS))
        assert chosen[0].reason == "priority 0.405, judged in iteration 1"

    @pytest.mark.parametrize(
        ("knobs", "field"),
        [
            ({"pass_score": 1.0}, "selection.pass_score"),
            ({"priority": "pass_rate", "noise_std": 0.1}, "selection.noise_std"),
            ({"eps": 0.0}, "selection.eps"),
            ({"decay": 1.5}, "selection.decay"),
            ({"priority": "mean"}, "selection.priority"),
        ],
    )
    def test_keys_that_nobody_would_read_are_refused(self, knobs, field):
        with pytest.raises(ConfigError) as refused:
            made("variance", **knobs)
        assert refused.value.field == field

    def test_what_cannot_work(self):
        given = prompts(*NAMES)
        assert made("variance").objection(plan(given, reuse=False)).field == "prompts.reuse"
        assert made("variance").objection(plan(given, samples_per_prompt=1)).field == "sampling.samples_per_prompt"


class TestCurriculum:
    GIVEN: ClassVar = [Prompt(id=name, text=name, token_ids=(1,), difficulty=float(n)) for n, name in enumerate(NAMES)]

    def test_the_share_grows_and_stays(self):
        given = made("curriculum", full_at=5)
        assert [given.quantile(t) for t in (1, 2, 3, 5, 6, 9)] == pytest.approx([0.3, 0.475, 0.65, 1.0, 1.0, 1.0])
        assert [made("curriculum", full_at=1).quantile(t) for t in (1, 2)] == [1.0, 1.0]
        narrow = made("curriculum", first_quantile=0.5, last_quantile=0.75, full_at=2)
        assert [narrow.quantile(t) for t in (1, 2, 3)] == [0.5, 0.75, 0.75]

    def test_only_the_easiest_are_drawn_easy_first(self):
        chosen = made("curriculum", by="column").select(pool(self.GIVEN))
        assert set(ids(chosen)) <= {*NAMES[:8]}  # 0.3 * 24 = 7.2
        assert ids(chosen) == sorted(ids(chosen))
        assert sorted(one.probability for one in chosen) == pytest.approx([1 / 8, 1 / 7, 1 / 6, 1 / 5])
        assert chosen[0].reason == f"difficulty {int(chosen[0].prompt_id[1:])}"

    def test_where_they_are_too_few_the_next_easiest_follow(self):
        chosen = made("curriculum", by="column", first_quantile=0.1).select(pool(self.GIVEN, per_iteration=6, most=6))
        assert ids(chosen) == NAMES[:6]  # 2.4 of 24 are the easiest
        assert [one.probability for one in chosen[3:]] == [1.0] * 3
        assert chosen[5].reason == "difficulty 5, next"

    def test_each_round_of_dynamic_sampling_is_in_order_by_itself(self):
        chosen = ids(made("curriculum", by="column").select(pool(self.GIVEN, most=12)))
        rounds = [chosen[:4], chosen[4:8], chosen[8:]]
        assert all(one == sorted(one) for one in rounds)
        assert set(chosen[:8]) == {*NAMES[:8]}
        assert rounds[2] == NAMES[8:12]

    def test_over_the_run_it_is_a_permutation(self):
        """With as many prompts as are wanted, every one comes once, and on the whole the easy ones come first."""
        asked: Counter[str] = Counter()
        order: list[str] = []
        for iteration in range(1, 4):
            some = pool(self.GIVEN, iteration=iteration, per_iteration=8, most=8, reuse=False, asked=dict(asked))
            order += ids(made("curriculum", by="column").select(some))
            asked.update(order[-8:])
        assert sorted(order) == NAMES
        assert set(order[:8]) == {*NAMES[:8]}

    def test_by_pass_rate_and_by_gap(self):
        visits = {
            "a": Visit(iteration=1, scores=(1.0, 1.0)),
            "b": Visit(iteration=1, scores=(0.0, 1.0)),
            "c": Visit(iteration=1, scores=(0.2, 0.3)),
        }
        some = pool(prompts("a", "b", "c", "new"), iteration=9, visits=visits)
        assert ids(made("curriculum").select(some))[0] == "a"
        assert ids(made("curriculum").select(some))[-1] == "c"
        assert ids(made("curriculum", pass_score=0.25).select(some)).index("a") == 0
        by_gap = ids(made("curriculum", by="gap").select(some))
        assert (by_gap[0], by_gap[-1]) == ("b", "a")

    def test_one_that_was_never_judged_stands_in_the_middle(self):
        visits = {name: Visit(iteration=1, scores=(n / 4,)) for n, name in enumerate("abcde")}
        given = prompts(*"abcde", "new")
        some = pool(given, iteration=9, per_iteration=6, most=6, visits=visits)
        by = {"by": "pass_rate", "pass_score": 0.5}
        order = ids(made("curriculum", **by).select(some))
        assert order.index("new") in (0, 1, 2, 3)  # the median passes, like c, d and e
        assert {*order[4:]} == {"a", "b"}

    def test_where_the_share_ends_among_equals_does_not_depend_on_names(self):
        alike = [dataclasses.replace(prompt, difficulty=1.0) for prompt in self.GIVEN]
        drawn_in = {i for seed in range(40) for i in ids(made("curriculum", by="column").select(pool(alike, seed=seed)))}
        assert drawn_in == {*NAMES}

    @pytest.mark.parametrize(
        ("knobs", "field"),
        [
            ({"by": "gap", "pass_score": 1.0}, "selection.pass_score"),
            ({"first_quantile": 0.5, "last_quantile": 0.4}, "selection.last_quantile"),
            ({"first_quantile": 0.0}, "selection.first_quantile"),
            ({"full_at": 0}, "selection.full_at"),
        ],
    )
    def test_keys_that_make_no_sense_are_refused(self, knobs, field):
        with pytest.raises(ConfigError) as refused:
            made("curriculum", **knobs)
        assert refused.value.field == field

    def test_what_cannot_work(self):
        given = [*self.GIVEN[:-1], dataclasses.replace(self.GIVEN[-1], difficulty=None)]
        lacking = made("curriculum", by="column").objection(plan(given))
        assert (lacking.field, "1 of 24 training prompts" in lacking.cause) == ("selection.by", True)
        assert made("curriculum").objection(plan(given, reuse=False)).field == "prompts.reuse"
        assert made("curriculum", by="gap").objection(plan(given, samples_per_prompt=1)).field == "sampling.samples_per_prompt"
        assert made("curriculum").objection(plan(given, samples_per_prompt=1)) is None
        assert made("curriculum", by="column").objection(plan(self.GIVEN, reuse=False)) is None


class TestRegenerate:
    ALL = NAMES[:6]

    def some(
        self, latest: dict[str, tuple[float, ...]], first: dict[str, tuple[float, ...]] | None = None, **more: Any
    ) -> Pool:
        """Of iteration 3: all were sampled in iteration 1, and judged so, and trained on again in iteration 2 as `latest` has it."""
        visits = {i: Visit(iteration=2, scores=scores) for i, scores in latest.items()}
        begun = {i: Visit(iteration=1, scores=scores) for i, scores in (first or latest).items()}
        base = pool(prompts(*self.ALL), iteration=3, per_iteration=6, most=6, asked=dict.fromkeys(latest, 2), visits=visits)
        return dataclasses.replace(base, **{"first_visits": begun, **more})

    def again(self, chosen: Any) -> set[str]:
        return {one.prompt_id for one in chosen if one.reused_from is None}

    def test_raw_takes_the_lowest_mean_scores(self):
        latest = {name: (n / 6, n / 6 + 0.1) for n, name in enumerate(self.ALL)}
        chosen = made("regenerate", rank="raw").select(self.some(latest))
        assert self.again(chosen) == {"p00", "p01", "p02"}
        assert {one.reused_from for one in chosen} == {None, 2}

    def test_base_takes_those_that_have_come_least_far_for_their_own_prompt(self):
        """p00 has low scores and has become better by two standard deviations of its first ones; p05 high ones, and worse."""
        first = {name: (n - 1.0, n + 1.0) for n, name in enumerate(self.ALL)}  # mean n, standard deviation 1
        moved = {"p00": 2.0, "p01": 1.0, "p02": 0.5, "p03": 0.0, "p04": -0.5, "p05": -1.0}
        latest = {name: (first[name][0] + moved[name], first[name][1] + moved[name]) for name in self.ALL}
        chosen = made("regenerate").select(self.some(latest, first))
        assert self.again(chosen) == {"p03", "p04", "p05"}
        (one,) = (each for each in chosen if each.prompt_id == "p00")
        assert one.reason == "responses of iteration 2 once more: base rank 2"
        raw = made("regenerate", rank="raw").select(self.some(latest, first))
        assert self.again(raw) == {"p00", "p01", "p02"}

    def test_first_scores_that_are_all_alike_have_the_usual_spread(self):
        """The median of the others' standard deviations: 1 here."""
        first = {name: (0.0, 2.0) for name in self.ALL} | {"p00": (1.0, 1.0)}
        latest = {name: (2.0, 2.0) for name in self.ALL} | {"p00": (1.5, 1.5), "p01": (1.25, 1.25)}
        chosen = {one.prompt_id: one.reason for one in made("regenerate", rho=0.3).select(self.some(latest, first))}
        assert "rank 0.5," in chosen["p00"]
        assert "rank 0.25," in chosen["p01"]
        flat = {name: (1.0, 1.0) for name in self.ALL}
        chosen = made("regenerate", rho=0.1).select(self.some(flat | {"p02": (0.5, 0.5)}, flat))
        assert self.again(chosen) == {"p02"}

    def test_of_equals_chance_decides(self):
        """Each as often as any other, within 4.5 sigma."""
        latest, seeds = dict.fromkeys(self.ALL, (0.0, 1.0)), 200
        found = Counter(i for seed in range(seeds) for i in self.again(made("regenerate").select(self.some(latest, seed=seed))))
        assert all(abs(found[i] - seeds / 2) < 4.5 * (seeds / 4) ** 0.5 for i in self.ALL), found

    def test_what_is_too_old_comes_first_and_counts(self):
        latest = {name: (n / 6, n / 6) for n, name in enumerate(self.ALL)}
        old = {i: Visit(iteration=2, scores=scores, reused_from=1 if i >= "p04" else 2) for i, scores in latest.items()}
        chosen = made("regenerate", rank="raw", max_age=1).select(self.some(latest, visits=old))
        assert self.again(chosen) == {"p00", "p04", "p05"}, "two are two iterations old, and one has the lowest scores"
        reasons = {one.prompt_id: one.reason for one in chosen}
        assert reasons["p05"] == "sampled anew: its responses are 2 iterations old"
        chosen = made("regenerate", rank="raw", max_age=1, rho=0.1).select(self.some(latest, visits=old))
        assert self.again(chosen) == {"p04", "p05"}, "all of them, although they are more than a tenth"
        chosen = made("regenerate", rank="raw").select(self.some(latest, visits=old))
        assert self.again(chosen) == {"p00", "p01", "p02"}

    @pytest.mark.parametrize(("rho", "count"), [(0.01, 1), (0.5, 3), (0.51, 4), (0.7, 5), (1.0, 6)])
    def test_the_share_is_rounded_up(self, rho, count):
        latest = {name: (n / 6, n / 6) for n, name in enumerate(self.ALL)}
        assert len(self.again(made("regenerate", rho=rho).select(self.some(latest)))) == count

    def test_what_nobody_has_judged_is_sampled(self):
        latest = {name: (float(n), 0.0) for n, name in enumerate(self.ALL[:4])}
        chosen = made("regenerate").select(self.some(latest, asked=dict.fromkeys(self.ALL[:5], 2)))
        reasons = {one.prompt_id: one.reason for one in chosen}
        assert reasons["p04"] == "sampled anew: no verdict is known yet"
        assert reasons["p05"] == "sampled for the first time"
        assert len(self.again(chosen)) == 2 + 2, "half of the four, and these"

    def test_prompts_are_those_of_shuffled(self):
        """Over four passes of four iterations each, and within each in the same order."""
        given, asked, cursor = prompts(*NAMES), Counter[str](), 0
        shuffled = ShuffledPrompts(given, seed=3, reuse=True)
        for iteration in range(1, 17):
            chosen = ids(
                made("regenerate").select(pool(given, iteration=iteration, per_iteration=6, most=6, asked=dict(asked)))
            )
            expected, cursor = shuffled.take(6, cursor)
            assert chosen == [prompt.id for prompt in expected]
            asked.update(chosen)

    def test_with_dynamic_sampling_each_round_has_its_share(self):
        latest = {name: (n / 6, n / 6) for n, name in enumerate(self.ALL)}
        chosen = made("regenerate").select(self.some(latest, per_iteration=2))
        assert [len(self.again(chosen[start : start + 2])) for start in (0, 2, 4)] == [1, 1, 1]

    @pytest.mark.parametrize(
        ("knobs", "field"),
        [
            ({"rho": 0.0}, "selection.rho"),
            ({"rho": 1.1}, "selection.rho"),
            ({"max_age": 0}, "selection.max_age"),
            ({"rank": "best"}, "selection.rank"),
            ({"rho": 1.0, "max_age": 3}, "selection.max_age"),
            ({"rho": 1.0, "rank": "raw"}, "selection.rank"),
        ],
    )
    def test_keys_that_make_no_sense_are_refused(self, knobs, field):
        with pytest.raises(ConfigError) as refused:
            made("regenerate", **knobs)
        assert refused.value.field == field

    @pytest.mark.parametrize(
        ("size", "changes", "knobs", "field", "said"),
        [
            (6, {"reuse": False}, {}, "prompts.reuse", "selection.rank=base goes by how it was judged the last time"),
            (6, {"samples_per_prompt": 1}, {}, "sampling.samples_per_prompt", "is 1"),
            (24, {}, {}, "selection.max_age", "is 2, and a prompt comes again after 6 iterations or more"),
            (4, {"max_lag": 1}, {"max_age": 1}, "selection.max_age", "schedule.max_lag=1 responses are 2 iterations old"),
            (4, {"iterations": 1}, {}, "iterations", "before iteration 2: 4 prompts of 4"),
            (8, {"iterations": 2}, {}, "iterations", "before iteration 3: 4 prompts of 8"),
            (4, {"iterations": 2, "max_lag": 1}, {}, "iterations", "before iteration 3"),
        ],
    )
    def test_what_cannot_work(self, size, changes, knobs, field, said):
        objection = made("regenerate", **knobs).objection(plan(prompts(*NAMES[:size]), **changes))
        assert (objection.field, said in objection.cause) == (field, True), objection
        assert objection.fix

    @pytest.mark.parametrize(
        ("size", "changes", "knobs"),
        [
            (4, {"iterations": 2}, {}),
            (8, {}, {}),
            (8, {"rounds": 2, "iterations": 2}, {}),
            (24, {"iterations": 7}, {"max_age": 6}),
            (4, {"max_lag": 1}, {}),
            (4, {"samples_per_prompt": 1}, {"rank": "raw"}),
            (4, {"reuse": False, "iterations": 1}, {"rho": 1.0}),
        ],
    )
    def test_what_can(self, size, changes, knobs):
        assert made("regenerate", **knobs).objection(plan(prompts(*NAMES[:size]), **changes)) is None

    @pytest.mark.parametrize(
        ("rho", "changes", "most"),
        [
            (0.5, {}, 4 + 2 + 2),
            (0.5, {"iterations": 6}, 4 + 5 * 2),
            (0.5, {"iterations": 6, "max_lag": 1}, 4 + 4 + 4 * 2),
            (0.25, {"iterations": 5}, 4 + 1 + 1 + 3 + 3),
            (0.5, {"rounds": 2}, 3 * 2 * 4),
            (1.0, {}, 3 * 4),
        ],
    )
    def test_how_much_is_sampled_at_most(self, rho, changes, most):
        assert made("regenerate", rho=rho).most_sampled(plan(prompts(*NAMES[:4]), **changes)) == most
        assert made("regenerate", rho=rho).most_sampled(plan(prompts(*NAMES[:5]))) == 3 * 4, "all, where some are left out"


class TestBorda:
    @staticmethod
    def visit(scores: tuple[float, ...], std: tuple[float, ...]) -> Visit:
        return Visit(iteration=1, scores=scores, components={"std": std})

    def test_acquisition_by_hand(self):
        """Means 1 and 0, the first within 2 * 0.5: at best it is 2 and wins with sigmoid(2), at worst 0 and wins half."""
        one = self.visit((1.0, 0.0), (0.5, 0.0))
        assert made("borda").acquisition(one) == pytest.approx(1 / (1 + math.exp(-2)) - 0.5)
        assert made("borda", k=1.0).acquisition(one) == pytest.approx(1 / (1 + math.exp(-1.5)) - 1 / (1 + math.exp(-0.5)))
        assert made("borda", beta=0.1).acquisition(one) == pytest.approx(1 / (1 + math.exp(-0.2)) - 0.5)

    def test_with_three_the_score_is_the_mean_over_the_others(self):
        def sigmoid(x: float) -> float:
            return 1 / (1 + math.exp(-x))

        high, low = (2.0, 1.0, 0.5), (0.0, -1.0, -0.5)  # of means 1, 0, 0 and spreads 0.5, 0.5, 0.25
        borda = [[(sigmoid(ours[a] - theirs[b]) + sigmoid(ours[a] - theirs[c])) / 2 for a, b, c in ((0, 1, 2), (1, 0, 2), (2, 0, 1))]
                 for ours, theirs in ((high, low), (low, high))]  # fmt: skip
        found = made("borda").acquisition(self.visit((1.0, 0.0, 0.0), (0.5, 0.5, 0.25)))
        assert found == pytest.approx(max(borda[0]) - max(borda[1]))

    @pytest.mark.parametrize("scores", [(0.0, 1.0), (3.0, -1.0, 1e6), (0.5, 0.5, 0.5, 0.5), (1.0,)])
    def test_where_nothing_is_spread_it_is_0(self, scores):
        assert made("borda").acquisition(self.visit(scores, (0.0,) * len(scores))) == 0.0

    def test_it_grows_with_the_spread_and_with_how_many_deviations_count(self):
        def of(std: float, **knobs: float) -> float:
            return made("borda", **knobs).acquisition(self.visit((1.0, 0.0, -1.0), (std,) * 3))

        assert 0 < of(0.1) < of(0.5) < of(5.0) <= 1
        assert of(0.5, k=1.0) < of(0.5)

    def spread(self, given: list[Prompt]) -> dict[str, Visit]:
        """The later in the list, the wider."""
        return {prompt.id: self.visit((0.0, 1.0), (n / 10, n / 10)) for n, prompt in enumerate(given)}

    def test_of_a_pool_that_holds_all_the_widest_are_taken(self):
        given = prompts(*NAMES)
        chosen = made("borda", pool_mult=6).select(pool(given, iteration=2, visits=self.spread(given)))
        assert ids(chosen) == NAMES[:-5:-1]
        assert all(one.reason.startswith("acquisition ") and one.reason.endswith("judged in iteration 1") for one in chosen)

    def test_a_pool_of_fewer_is_drawn_first(self):
        """So any prompt may be sampled, and of each pool those are that are among its widest."""
        given, found = prompts(*NAMES), Counter()
        for seed in range(200):
            chosen = made("borda", pool_mult=2).select(pool(given, seed=seed, iteration=2, visits=self.spread(given)))
            found.update(ids(chosen))
            assert len(chosen) == 4
        assert {*found} >= {*NAMES[12:]}
        assert not {*found} & {*NAMES[:4]}, "none of the four narrowest is in the upper half of eight"
        assert found[NAMES[23]] == pytest.approx(200 * 8 / 24, abs=3 * math.sqrt(200 * 2 / 9))
        assert found[NAMES[23]] > found[NAMES[12]] > found[NAMES[5]]

    def test_what_was_never_judged_comes_first(self):
        given = prompts(*NAMES, "new", "other")
        visits = self.spread(given[:-2]) | {"other": Visit(iteration=1, scores=(0.0, 1.0))}  # of which nobody knows the spread
        chosen = made("borda", pool_mult=7).select(pool(given, iteration=2, visits=visits))
        assert {*ids(chosen[:2])} == {"new", "other"}
        assert ids(chosen[2:]) == [NAMES[-1], NAMES[-2]]
        assert {one.reason for one in chosen[:2]} == {"new"}

    @pytest.mark.parametrize("key", ["pool_mult", "k", "beta"])
    def test_knobs_that_would_choose_nothing_are_refused(self, key):
        with pytest.raises(ConfigError, match=f"selection.{key}"):
            made("borda", **{key: 1 if key == "pool_mult" else 0.0})

    def test_objections(self):
        borda = made("borda")
        assert borda.objection(plan(prompts(*NAMES))) is None
        for changes, field in (
            ({"reuse": False}, "prompts.reuse"),
            ({"samples_per_prompt": 1}, "sampling.samples_per_prompt"),
            ({"per_iteration": 24}, "prompts.per_iteration"),
        ):
            assert borda.objection(plan(prompts(*NAMES), **changes)).field == field
