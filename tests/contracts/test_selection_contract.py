"""What every prompt selector promises; a new file under onlinerl/selection is found and tested by its name."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from onlinerl import registry
from onlinerl.config.roles import build
from onlinerl.errors import ConfigError
from onlinerl.protocols.selection import Selector
from onlinerl.types import Pool, Prompt, Selected, SelectionPlan, Visit

SOURCES = ("math", "code")
# Knobs without a default, and one that each other way of choosing needs.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mix": [{"weights": {"math": 3.0, "code": 1.0}, "max_visits": 4}],
    "curriculum": [{}, {"by": "gap"}, {"by": "column"}],
    "variance": [{}, {"priority": "pass_rate"}, {"priority": "positive_variance"}],
    "regenerate": [{}, {"rank": "raw"}],
}
CASES = [
    {"name": name, **knobs}
    for name in registry.names("selection")
    if build({"name": name, **VARIANTS.get(name, [{}])[0]}, "selection").chooses
    for knobs in VARIANTS.get(name, [{}])
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(str(v) for v in case.values() if isinstance(v, str)))
def selector(request) -> Selector:
    """Every selector that chooses."""
    return build(request.param, "selection")


def prompts(count: int = 60) -> list[Prompt]:
    return [
        Prompt(id=f"p{n}", text=f"question {n}", token_ids=(n,), source=SOURCES[n % 2], difficulty=float(n % 7))
        for n in range(count)
    ]


def visit(rng: random.Random, iteration: int) -> Visit:
    """Four responses, and how far an ensemble is apart about each."""
    scores, spreads = (tuple(rng.random() for _ in range(4)) for _ in range(2))
    return Visit(iteration=iteration, scores=scores, components={"std": spreads})


def pool(**changes: Any) -> Pool:
    """Of the third iteration of a run that has sampled ten prompts before."""
    rng = random.Random(0)
    seen = [f"p{n}" for n in range(10)]
    visits = {i: visit(rng, 1 + n % 2) for n, i in enumerate(seen)}
    base = Pool(
        prompts=prompts(),
        iteration=3,
        seed=7,
        per_iteration=6,
        most=12,
        reuse=True,
        asked=dict.fromkeys(seen, 1),
        visits=visits,
        first_visits={i: Visit(iteration=1, scores=tuple(rng.random() for _ in range(4))) for i in seen},
    )
    return dataclasses.replace(base, **changes)


def ids(chosen: list[Selected]) -> list[str]:
    return [one.prompt_id for one in chosen]


def test_what_is_there_is_found():
    assert {case["name"] for case in CASES} == {"shards", "mix", "curriculum", "variance", "regenerate", "borda"}
    assert "shuffled" in registry.names("selection")


@pytest.mark.parametrize("name", registry.names("selection"))
def test_the_name_chooses_it_and_an_unknown_key_is_refused(name):
    spec = {"name": name, **VARIANTS.get(name, [{}])[0]}
    assert build(spec, "selection").name == name
    with pytest.raises(ConfigError, match="no_such_key: is not a known key"):
        build({**spec, "no_such_key": 1}, "selection")


@pytest.mark.parametrize("most", [6, 7, 12, 24])
def test_no_prompt_twice_each_is_there_and_as_many_as_are_wanted(selector, most):
    chosen = selector.select(pool(most=most))
    assert len(set(ids(chosen))) == len(chosen)
    assert 6 <= len(chosen) <= most
    assert set(ids(chosen)) <= {prompt.id for prompt in prompts()}
    assert all(0 < one.probability <= 1 and one.reason for one in chosen)


def test_the_order_of_the_file_does_not_matter(selector):
    """And the same pool gives the same answer: there is no other chance, and nothing is remembered."""
    expected = selector.select(pool())
    mixed = prompts()
    random.Random(1).shuffle(mixed)
    assert selector.select(pool(prompts=mixed)) == expected
    again = pool()
    backwards = dataclasses.replace(
        again, asked=dict(reversed(again.asked.items())), visits=dict(reversed(again.visits.items()))
    )
    assert build(selector.model_dump(), "selection").select(backwards) == expected


def test_another_seed_makes_another_choice(selector):
    assert selector.select(pool()) != selector.select(pool(seed=8))


def test_more_prompts_than_asked_for_before_begin_with_the_same_ones(selector):
    """Who takes the place of a prompt that teaches nothing comes behind those that are sampled anyway."""
    fewer, more = ids(selector.select(pool(most=6))), ids(selector.select(pool(most=12)))
    assert more[:6] == fewer


def test_without_reuse_nothing_comes_again(selector):
    chosen = selector.select(pool(reuse=False))
    assert not set(ids(chosen)) & pool().asked.keys()


def test_adding_prompts_keeps_the_others_in_their_order(selector):
    """What is drawn is drawn by a hash of its own."""
    if selector.name in (
        "curriculum",
        "mix",
        "borda",
    ):  # where shares end, whose turn it is, and who competes depends on how many there are
        pytest.skip("what is drawn from depends on how many prompts there are")
    before = ids(selector.select(pool(most=60)))
    after = ids(
        selector.select(pool(most=61, prompts=[*prompts(), Prompt(id="new", text="another", token_ids=(1,), source="math")]))
    )
    assert [i for i in after if i != "new"] == before


def test_nothing_is_lost(selector):
    """Asked again and again without reuse, it gives every prompt once: a permutation of what there is."""
    asked: Counter[str] = Counter()
    for iteration in range(1, 11):
        some = pool(iteration=iteration, reuse=False, asked=dict(asked), visits={}, most=6)
        if selector.name == "shards":  # whose shards are not all of one size
            some = dataclasses.replace(some, most=60)
        asked.update(ids(selector.select(some)))
    assert asked == Counter(prompt.id for prompt in prompts())


def test_uniform_where_all_are_alike(selector):
    """Over many seeds every prompt comes as often as any other, within 4.5 sigma of its binomial count."""
    alike = [dataclasses.replace(prompt, difficulty=1.0) for prompt in prompts(20)]
    if selector.name == "mix":
        selector = build({"name": "mix", "weights": dict.fromkeys(SOURCES, 1.0)}, "selection")
    visits = {prompt.id: Visit(iteration=1, scores=(0.0, 1.0), components={"std": (0.0, 0.0)}) for prompt in alike}
    found: Counter[str] = Counter()
    iteration, seeds = (5 if selector.name == "curriculum" else 1), 150  # a curriculum has opened by then
    for seed in range(seeds):
        if selector.name == "shards":  # one that holds all: its order is the chance
            selector = build({"name": "shards", "shards": 1}, "selection")
        some = Pool(prompts=alike, iteration=iteration, seed=seed, per_iteration=5, most=5, reuse=True, asked={}, visits=visits)
        found.update(ids(selector.select(some)))
    sigma = (seeds * 0.25 * 0.75) ** 0.5
    assert all(abs(found[prompt.id] - seeds / 4) < 4.5 * sigma for prompt in alike), found


@pytest.mark.parametrize("name", registry.names("selection"))
def test_it_is_a_value(name):
    """A selector has no state: what it knows is in the pool."""
    made = build({"name": name, **VARIANTS.get(name, [{}])[0]}, "selection")
    with pytest.raises(ValidationError):
        made.name = "another"


def test_it_says_what_it_reads(selector):
    """Who reads no scores chooses the same without them."""
    without = selector.select(pool(most=60, visits={}))
    assert (selector.select(pool(most=60)) == without) == (not selector.reads_scores)
    if not selector.reads_first_visits:
        assert selector.select(pool(most=60, first_visits={})) == selector.select(pool(most=60))


def test_what_it_reuses_is_there_and_is_no_reason_to_take_others(selector):
    """Responses of the last visit, in their place, by those who say so; with as many prompts as there are and with few."""
    reused = 0
    for most, seen in ((60, 10), (60, 60), (6, 60)):
        known = [prompt.id for prompt in prompts()][:seen]
        visits = {i: Visit(iteration=2, scores=(0.0, n / 60), reused_from=(1, None)[n % 2]) for n, i in enumerate(known)}
        some = pool(most=most, per_iteration=most, asked=dict.fromkeys(known, 1), visits=visits, first_visits=visits)
        chosen = selector.select(some)
        for one in chosen:
            assert one.reused_from in (None, visits[one.prompt_id].sampled_in if one.prompt_id in visits else None)
        reused += sum(one.reused_from is not None for one in chosen)
    assert (reused > 0) == selector.reuses
    assert selector.reads_scores or not selector.reuses


def plan(**changes: Any) -> SelectionPlan:
    base = SelectionPlan(prompts=prompts(), iterations=3, seed=7, per_iteration=6, rounds=1, samples_per_prompt=4, reuse=True)
    return dataclasses.replace(base, **changes)


def fitting(selector: Selector, **changes: Any) -> SelectionPlan:
    """A plan that it goes with: responses are reused where prompts come again soon."""
    return plan(**({"prompts": prompts(12)} if selector.reuses else {}), **changes)


def test_what_works_is_not_objected_to(selector):
    assert selector.objection(fitting(selector)) is None


def test_no_more_is_sampled_than_it_foretells(selector):
    """Whatever the verdicts; those that do not reuse anything sample all."""
    for seed in range(5):
        rng = random.Random(seed)
        planned = plan(prompts=prompts(12), iterations=6, per_iteration=12, seed=seed) if selector.reuses else plan()
        asked, visits, first, sampled = Counter[str](), {}, {}, 0
        for t in range(1, planned.iterations + 1):
            some = pool(prompts=planned.prompts, seed=seed, iteration=t, per_iteration=planned.per_iteration)
            some = dataclasses.replace(
                some, most=planned.per_iteration, asked=dict(asked), visits=dict(visits), first_visits=first
            )
            for one in selector.select(some):
                asked[one.prompt_id] += 1
                sampled += one.reused_from is None
                scores = tuple(rng.random() for _ in range(4)) if one.reused_from is None else visits[one.prompt_id].scores
                visits[one.prompt_id] = Visit(iteration=t, scores=scores, reused_from=one.reused_from)
                first.setdefault(one.prompt_id, visits[one.prompt_id])
        assert sampled <= selector.most_sampled(planned) <= planned.iterations * planned.per_iteration
        assert selector.reuses or sampled == selector.most_sampled(planned)


def test_what_it_does_not_object_to_can_be_chosen(selector):
    """For as long as the run goes on, with as many iterations as were planned."""
    asked: Counter[str] = Counter()
    planned = fitting(selector, iterations=9)
    assert selector.objection(planned) is None
    for iteration in range(1, planned.iterations + 1):
        chosen = ids(selector.select(pool(iteration=iteration, asked=dict(asked), visits={}, most=6)))
        assert len(chosen) == 6
        asked.update(chosen)
