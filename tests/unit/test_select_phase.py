"""The phase that chooses prompts: what a selector is told, what it may answer, and that what it chose stays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from onlinerl.config.roles import build
from onlinerl.controller import history
from onlinerl.controller.iteration import Iteration, Weights
from onlinerl.controller.parts import Parts
from onlinerl.controller.phases.select import select
from onlinerl.controller.reuse import Reused
from onlinerl.errors import ConfigError, PromptError, StoreError
from onlinerl.oracle_checks import check_scored
from onlinerl.prompts._source import ShuffledPrompts
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.selection import Selector
from onlinerl.protocols.store import ROLLOUTS, VERDICTS
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.rows import SELECTION, Codec
from onlinerl.stores.tables import StoredTable
from onlinerl.types import Failure, Group, Label, Pool, Prompt, Rollout, Sampling, Selected, Verdict

PROMPTS = [Prompt(id=f"p{n}", text=f"the {n}", token_ids=(1,), difficulty=float(n)) for n in range(9)]


class Told(Selector):
    """Chooses what it was made with."""

    name: str = "told"
    answer: list[list[Any]] = []  # noqa: RUF012  (pydantic copies it)
    scores: bool = True
    may_reuse: bool = False
    sources: dict[str, int] = {}  # noqa: RUF012

    @property
    def reads_scores(self) -> bool:
        return self.scores

    @property
    def reads_first_visits(self) -> bool:
        return self.may_reuse

    @property
    def reuses(self) -> bool:
        return self.may_reuse

    def select(self, pool: Pool) -> Sequence[Selected]:
        return [Selected(prompt_id=i, probability=p, reason="told", reused_from=self.sources.get(i)) for i, p in self.answer]


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


def sampled(store: RunDirectory, number: int, results: dict[str, Any], **sources: int) -> None:
    """An iteration that chose these prompts, and what was said of them; `sources` is where their responses are from, if not from it."""
    chosen = [Selected(prompt_id=i, probability=1.0, reason="", reused_from=sources.get(i)) for i in results]
    for table, rows in (
        (store.selection(number), chosen),
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


class Wide(Told):
    """Reads how far an ensemble is apart, too."""

    @property
    def components(self) -> tuple[str, ...]:
        return ("std",)


def test_it_is_told_the_other_scores_that_it_reads(store, iteration):
    """Of the same responses, in their order; where the oracle gave none there are none."""
    several = replace(
        verdict(0.0, float("nan"), 2.0, unjudged=(1,)), components={"std": (0.1, float("nan"), 0.3), "length": (1.0, 2.0, 3.0)}
    )
    sampled(store, 1, {"p0": several, "p1": verdict(0.0, 1.0)})
    pool = history.pool(iteration(2, Wide()))
    assert {i: (v.scores, dict(v.components)) for i, v in pool.visits.items()} == {
        "p0": ((0.0, 2.0), {"std": (0.1, 0.3)}),
        "p1": ((0.0, 1.0), {}),
    }
    assert not any(visit.components for visit in history.pool(iteration(2, told())).visits.values()), "nobody reads them"


def test_it_is_told_where_responses_are_from_and_what_was_said_first(store, iteration):
    sampled(store, 1, {"p0": verdict(0.0, 1.0), "p1": Failure(kind="error", message="")})
    sampled(store, 2, {"p0": verdict(0.0, 1.0), "p1": verdict(2.0, 3.0)}, p0=1)
    pool = history.pool(iteration(3, told(may_reuse=True)))
    assert {i: (v.iteration, v.sampled_in) for i, v in pool.visits.items()} == {"p0": (2, 1), "p1": (2, 2)}
    assert {i: (v.iteration, v.scores) for i, v in pool.first_visits.items()} == {"p0": (1, (0.0, 1.0)), "p1": (2, (2.0, 3.0))}
    assert not history.pool(iteration(3, told())).first_visits, "nobody reads them"


@pytest.mark.parametrize(
    ("sources", "more", "said"),
    [
        ({"p0": 1}, {}, "responses of iteration 1 to prompt 'p0', and its `reuses` is False"),
        ({"p1": 1}, {"may_reuse": True}, "responses of iteration 1 to prompt 'p1', and there are none that were judged"),
        ({"p0": 2}, {"may_reuse": True}, "responses of iteration 2 to prompt 'p0', and the last that were judged are of 1"),
        ({"p0": 1}, {"may_reuse": True, "scores": False}, "and there are none that were judged"),
    ],
)
def test_responses_that_are_not_there_are_not_reused(store, iteration, sources, more, said):
    sampled(store, 1, {"p0": verdict(0.0, 1.0), "p1": None})
    sampled(store, 2, {"p0": verdict(0.0, 1.0)}, p0=1)
    with pytest.raises(PromptError, match=said):
        select(iteration(3, told("p0", "p1", sources=sources, **more)))
    assert not store.selection(3).sealed


def test_a_choice_of_a_version_that_reused_nothing_is_read(store, iteration):
    """Its table has no such column."""
    rows = [{"prompt_id": "p7", "probability": 1.0, "reason": ""}, {"prompt_id": "p2", "probability": 0.5, "reason": "old"}]
    older = Codec(SELECTION.schema.remove(SELECTION.schema.get_field_index("reused_from")), dict, dict)
    folder = store.path / "iterations/0001"
    folder.mkdir(parents=True, exist_ok=True)
    table = StoredTable(TableFiles(folder, "selection", older.schema), older)
    table.append(rows)
    table.seal()
    it = iteration(1, told())
    assert [(one.prompt_id, one.reused_from) for one in it.chosen] == [("p7", None), ("p2", None)]
    assert it.reused == {}


def rollout(seed: int, version: int, tokens: int = 2) -> Rollout:
    return Rollout(
        token_ids=(1,) * tokens,
        logprobs=(-1.0,) * tokens,
        text=f"{seed}",
        finish_reason="stop",
        policy_version=version,
        sampler=Sampling(),
        seed=seed,
    )


@pytest.fixture
def reusing(store, iteration):
    """Iteration 4 of a run, which reuses responses of iterations 1 and 2 and samples p3 anew."""
    for number, names in ((1, ("p0", "p1")), (2, ("p2",))):
        sampled(store, number, dict.fromkeys(names, verdict(0.0, 1.0)))
        groups = store.groups(number, ROLLOUTS, {prompt.id: prompt for prompt in PROMPTS})
        groups.append(
            [Group(prompt=PROMPTS[int(i[1])], rollouts=(rollout(7, number - 1), rollout(8, number - 1))) for i in names]
        )
        groups.seal()
    sources = {"p0": 1, "p1": 1, "p2": 2}
    store.selection(4).append(
        [Selected(prompt_id=i, probability=1.0, reason="", reused_from=sources.get(i)) for i in ("p0", "p1", "p2", "p3")]
    )
    store.selection(4).seal()
    store.finish_phase(3, "sample", {"next_cursor": 0})
    return iteration(4, told(may_reuse=True), each=4)


def test_reused_responses_are_copied_as_they_are(reusing):
    reuse = Reused(reusing)
    assert reuse.take(reusing.prompts()[0]) == ["p0", "p1", "p2"]
    there = {group.prompt.id: group for group in reusing.groups()}
    assert {i: {r.policy_version for r in group.rollouts} for i, group in there.items()} == {"p0": {0}, "p1": {0}, "p2": {1}}
    assert [r.seed for r in there["p0"].rollouts] == [7, 8]
    assert (reuse.by_age, reuse.tokens) == ({"2": 1, "3": 2}, 3 * 4)


def test_a_kill_among_the_copies_leaves_no_group_out_and_none_there_twice(store, reusing):
    whole = next(store.groups(1, ROLLOUTS, {p.id: p for p in PROMPTS}).select(["p1"]))
    reusing.groups().append([whole])
    reuse = Reused(reusing)
    assert reuse.take(reusing.prompts()[0]) == ["p0", "p2"]
    assert sorted(group.prompt.id for group in reusing.groups()) == ["p0", "p1", "p2"]
    assert (reuse.by_age, reuse.tokens) == ({"2": 1, "3": 2}, 3 * 4), "what was there counts, too"
    assert Reused(reusing).take(reusing.prompts()[0]) == []


def test_what_was_thrown_away_when_it_was_sampled_is_not_thrown_away_again(store, reusing):
    """A group with rejected responses would be waited for, because a resume asks for it again until the table is complete."""
    groups = store.groups(5, ROLLOUTS, {p.id: p for p in PROMPTS})
    groups.append([Group(prompt=PROMPTS[4], rollouts=(rollout(7, 4),), rejected=("abort",))])
    reusing.__dict__ |= {"reused": {"p4": 5}, "chosen": [Selected(prompt_id="p4", probability=1.0, reason="", reused_from=5)]}
    store.selection(5).append(reusing.chosen)
    store.selection(5).seal()
    store.finish_phase(4, "sample", {"next_cursor": 0})
    Reused(reusing).take([PROMPTS[4]])
    (copied,) = reusing.groups()
    assert (len(copied.rollouts), copied.rejected) == (1, ())


def test_reused_responses_that_are_gone_stop_the_run(reusing):
    reusing.__dict__["reused"] = {**reusing.reused, "p3": 2}
    with pytest.raises(
        StoreError, match="the responses of iteration 2 to prompt 'p3', which are to be trained on once more"
    ) as gone:
        Reused(reusing).take(reusing.prompts()[0])
    assert gone.value.fix


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
    assert select(it) == {"prompts": 2, "visited": 0, "reused": 0, "newest": 0}
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
    config.selection = build({"name": "regenerate"}, "selection")
    with pytest.raises(ConfigError, match="regenerate goes by the scores of responses"):
        check_scored(config, given=False)
    config.selection = build({"name": "regenerate", "rho": 1.0}, "selection")
    check_scored(config, given=False)
    for spec, given in (("curriculum", True), ("curriculum", None), ("shards", False)):
        config.selection = build({"name": spec}, "selection")
        check_scored(config, given=given)
    config.selection = build({"name": "curriculum", "by": "column"}, "selection")
    check_scored(config, given=False)
