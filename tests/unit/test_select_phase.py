"""The phase that chooses prompts: what a selector is told, what it may answer, and that what it chose stays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from onlinerl.config.roles import build
from onlinerl.controller import history
from onlinerl.controller.iteration import Iteration, Weights
from onlinerl.controller.parts import Parts
from onlinerl.controller.phases.select import select
from onlinerl.errors import ConfigError, PromptError, StoreError
from onlinerl.oracle_checks import check_scored
from onlinerl.prompts._source import ShuffledPrompts
from onlinerl.protocols.algorithm import Needs
from onlinerl.protocols.selection import Selector
from onlinerl.protocols.store import ROLLOUTS, VERDICTS
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Failure, Group, Label, Pool, Prompt, Rollout, Sampling, Selected, Verdict

PROMPTS = [Prompt(id=f"p{n}", text=f"the {n}", token_ids=(1,), difficulty=float(n)) for n in range(9)]


class Told(Selector):
    """Chooses what it was made with."""

    name: str = "told"
    answer: list[list[Any]] = []  # noqa: RUF012  (pydantic copies it)
    scores: bool = True

    @property
    def reads_scores(self) -> bool:
        return self.scores

    def select(self, pool: Pool) -> Sequence[Selected]:
        return [Selected(prompt_id=i, probability=p, reason="told") for i, p in self.answer]


@pytest.fixture
def store(tmp_path):
    with RunDirectory.create(tmp_path / "run", config_yaml="", manifest={"name": "r", "fingerprint": {}}) as opened:
        yield opened


@pytest.fixture
def iteration(store):
    """Makes an iteration of a run whose selector this is."""

    def make(
        number: int, selector: Selector, *, lag: int = 0, reuse: bool = True, dynamic: bool = False, each: int = 2, **needs: Any
    ) -> Iteration:
        config = SimpleNamespace(
            seed=5,
            selection=selector,
            prompts=SimpleNamespace(per_iteration=each, reuse=reuse),
            sampling=SimpleNamespace(dynamic=dynamic, max_rounds=3),
            schedule=SimpleNamespace(max_lag=lag),
        )
        parts: Any = Parts.__new__(Parts)
        parts.__dict__ |= {
            "config": config,
            "algorithm": SimpleNamespace(needs=Needs(**needs)),
            "store": store,
            "train_prompts": ShuffledPrompts(PROMPTS, seed=5, reuse=reuse),
        }
        return Iteration(parts, number, Weights(), SimpleNamespace(), threading.Event())

    return make


def told(*ids: str, probability: float = 1.0, **more: Any) -> Told:
    return Told(answer=[[i, probability] for i in ids], **more)


def sampled(store: RunDirectory, number: int, results: dict[str, Any]) -> None:
    """An iteration that chose these prompts, and what was said of them."""
    for table, rows in (
        (store.selection(number), [Selected(prompt_id=i, probability=1.0, reason="") for i in results]),
        (store.labels(number, VERDICTS), [Label(prompt_id=i, result=said) for i, said in results.items() if said is not None]),
    ):
        table.append(rows)
        table.seal()
    store.finish_phase(number, "sample", {"prompts": len(results), "next_cursor": 2 * number})


def verdict(*scores: float, unjudged: tuple[int, ...] = ()) -> Verdict:
    return Verdict(annotator="a", oracle_version="v", scores=scores, unjudged=unjudged)


def test_what_a_selector_is_told(store, iteration):
    """Scores of the last time that a prompt was judged; failures and what nobody judged are none."""
    failed = Failure(kind="error", message="")
    sampled(store, 1, {"p0": verdict(0.0, 1.0), "p1": verdict(0.5, 0.5), "p3": verdict(2.0, 3.0)})
    sampled(store, 2, {"p1": verdict(1.0, float("nan"), unjudged=(1,)), "p2": failed, "p3": failed, "p4": None})
    pool = history.pool(iteration(3, told(), each=4))
    assert dict(pool.asked) == {"p0": 1, "p1": 2, "p2": 1, "p3": 2, "p4": 1}
    assert {i: (v.iteration, v.scores) for i, v in pool.visits.items()} == {
        "p0": (1, (0.0, 1.0)),
        "p1": (2, (1.0,)),
        "p3": (1, (2.0, 3.0)),
    }
    assert (pool.iteration, pool.seed, pool.per_iteration, pool.most, pool.reuse) == (3, 5, 4, 4, True)
    assert {prompt.id for prompt in pool.prompts} == {prompt.id for prompt in PROMPTS}
    assert not history.pool(iteration(3, told(scores=False), each=4)).visits, "nobody reads them"


def test_with_lag_the_iteration_before_is_sampled_and_not_yet_judged(store, iteration):
    """Also where it happens to be judged already, as after a resume."""
    sampled(store, 1, {"p0": verdict(0.0, 1.0)})
    sampled(store, 2, {"p1": verdict(0.0, 1.0)})
    pool = history.pool(iteration(3, told(), lag=1))
    assert (set(pool.asked), set(pool.visits)) == ({"p0", "p1"}, {"p0"})


def test_scores_are_those_of_the_policys_own_samples(store, iteration):
    """Not of the stored answer, or of the greedy response, which stand in the same group."""
    sources = (("policy", 1.0), ("policy", 0.0), ("policy", 1.0), ("teacher", 1.0))
    rollouts = tuple(
        Rollout(
            token_ids=(1,),
            logprobs=(-1.0,),
            text="",
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(temperature=temperature),
            seed=n,
            source=source,
        )
        for n, (source, temperature) in enumerate(sources)
    )
    groups = store.groups(1, ROLLOUTS, {PROMPTS[0].id: PROMPTS[0]})
    groups.append([Group(prompt=PROMPTS[0], rollouts=rollouts)])
    groups.seal()
    sampled(store, 1, {"p0": verdict(0.1, 0.2, 0.3, 0.4)})
    assert history.pool(iteration(2, told(), teacher=True)).visits["p0"].scores == (0.1, 0.3)
    assert history.pool(iteration(2, told())).visits["p0"].scores == (0.1, 0.2, 0.3, 0.4)


def test_with_dynamic_sampling_only_what_was_sampled_was_asked(store, iteration):
    rows = [Selected(prompt_id=f"p{n}", probability=1.0, reason="") for n in range(6)]
    store.selection(1).append(rows)
    store.selection(1).seal()
    store.finish_phase(1, "sample", {"prompts": 4, "kept": ["p1", "p3"], "next_cursor": 4})
    pool = history.pool(iteration(2, told(), dynamic=True))
    assert set(pool.asked) == {"p0", "p1", "p2", "p3"}
    assert (pool.per_iteration, pool.most) == (2, 6)


def test_what_was_chosen_is_what_is_sampled(store, iteration):
    it = iteration(1, told("p7", "p2"))
    assert select(it) == {"prompts": 2, "visited": 0, "newest": 0}
    assert [prompt.id for prompt in it.prompts()[0]] == ["p7", "p2"]
    assert it.prompts()[1] == 2
    later = iteration(1, told("p0", "p1"))  # who goes on after a kill asks nobody again
    assert select(later)["prompts"] == 2
    assert [prompt.id for prompt in later.prompts()[0]] == ["p7", "p2"]


def test_what_a_kill_tore_is_chosen_again_whole(store, iteration):
    store.selection(1).append([Selected(prompt_id="p5", probability=1.0, reason="torn")])
    it = iteration(1, told("p7", "p2"))
    select(it)
    assert [one.prompt_id for one in store.selection(1)] == ["p7", "p2"]


def test_a_choice_that_is_gone_is_an_error(iteration):
    with pytest.raises(StoreError, match="the prompts that were chosen for iteration 1 are not there"):
        iteration(1, told()).prompts()


def test_without_a_choice_prompts_are_taken_in_their_order(store, iteration):
    it = iteration(1, build({"name": "shuffled"}, "selection"))
    assert it.prompts() == it.parts.train_prompts.take(2, 0)
    assert not store.selection(1).sealed


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        (told("p0", "held-out"), "1 prompts that may not be sampled, e.g. 'held-out', which is no training prompt"),
        (told("p0", "p8"), "e.g. 'p8', which an earlier iteration has sampled"),
        (told("p0", "p0"), "1 prompts twice"),
        (told("p0"), "1 prompts, and 2 to 2 are wanted"),
        (told("p0", "p1", "p2"), "3 prompts, and 2 to 2 are wanted"),
        (told("p0", "p1", probability=0.0), "prompt 'p0' with probability 0"),
        (told("p0", "p1", probability=1.5), "prompt 'p0' with probability 1.5"),
        (told("p0", "p1", probability=float("nan")), "prompt 'p0' with probability nan"),
    ],
)
def test_what_cannot_be_sampled_is_refused_and_not_kept(store, iteration, selector, said):
    """Held-out prompts among it."""
    sampled(store, 1, {"p8": None})
    with pytest.raises(PromptError) as refused:
        select(iteration(2, selector, reuse=False))
    assert said in str(refused.value)
    assert refused.value.field == "selection.name"
    assert not store.selection(2).sealed
    select(iteration(2, told("p3", "p4"), reuse=False))  # once it is corrected
    assert [one.prompt_id for one in store.selection(2)] == ["p3", "p4"]


def test_what_a_selector_of_ones_own_raises_or_returns_is_said(store, iteration):
    class Failing(Selector):
        name: str = "failing"

        def select(self, pool):
            return [pool.prompts[99]]

    class Bare(Selector):
        name: str = "bare"

        def select(self, pool):
            return [prompt.id for prompt in pool.open]

    with pytest.raises(
        PromptError, match=r"Failing\.select failed: IndexError.*\n.*test_select_phase\.py, line \d+: return \[pool"
    ):
        select(iteration(1, Failing()))
    with pytest.raises(PromptError, match="chooses a str, which is no Selected"):
        select(iteration(1, Bare()))
    assert not store.selection(1).sealed


def test_an_oracle_that_only_compares_is_refused_where_scores_are_read():
    config: Any = SimpleNamespace(selection=build({"name": "curriculum"}, "selection"), oracle={"name": "pair_model"})
    with pytest.raises(ConfigError, match="goes by the scores of responses, and pair_model only compares") as refused:
        check_scored(config, given=False)
    assert (refused.value.field, bool(refused.value.fix)) == ("selection.name", True)
    for spec, given in (("curriculum", True), ("curriculum", None), ("shards", False)):
        config.selection = build({"name": spec}, "selection")
        check_scored(config, given=given)
    config.selection = build({"name": "curriculum", "by": "column"}, "selection")
    check_scored(config, given=False)
