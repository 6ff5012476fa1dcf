"""What may run when: the graph alone, with parts that only take time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from onlinerl import graph
from onlinerl.errors import ConfigError
from onlinerl.graph import NAMES, Phase, Task

SECONDS = {
    "examine": 2.0,
    "sample_reference": 3.0,
    "sample": 5.0,
    "label": 6.0,
    "annotate": 3.0,
    "train": 4.0,
    "checkpoint": 0.5,
    "sync": 0.5,
    "answer": 2.0,
    "measure": 2.0,
    "refresh": 2.5,
}
MODES = [(stream, beside, lag) for lag in (0, 1) for stream in (False, True) for beside in (False, True)]
ITERATIONS = 4


def simulate(
    rows: Sequence[Phase],
    done: dict[int, set[str]],
    *,
    shared: bool = False,
    until: float = 1e9,
    jitter: random.Random | None = None,
) -> list[tuple[float, float, Task]]:
    """(start, end, task) of every phase that ends before `until`, in virtual time; what has ended is added to `done`."""
    now, running, begun, made = 0.0, dict[Task, float](), dict[Task, float](), []
    follows = {row.name: row.follows for row in rows}
    heap: list[tuple[float, Task]] = []
    while True:
        unfinished = [t for t, names in done.items() if "commit" not in names][: graph.IN_FLIGHT]
        while task := next(graph.ready(rows, unfinished, done, running, shared_hardware=shared), None):
            t, name = task
            seconds = SECONDS.get(name, 0.0) * (jitter.uniform(0.5, 2) if jitter else 1)
            followed = running.get((t, follows[name] or ""), 0.0)
            running[task], begun[task] = max(now + seconds, followed), now
            heapq.heappush(heap, (running[task], task))
        if not heap:
            return made
        now, task = heapq.heappop(heap)
        if now > until:
            return made
        del running[task]
        done[task[0]].add(task[1])
        made.append((begun[task], now, task))


def nothing_done() -> dict[int, set[str]]:
    return {t: set() for t in range(ITERATIONS + 1)}


def test_one_after_the_other():
    made = simulate(graph.PHASES, nothing_done())
    assert [task for _, _, task in made] == [
        *((0, name) for name in ("sync", "answer", "measure", "commit")),
        *((t, name) for t in range(1, ITERATIONS + 1) for name in NAMES),
    ]
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(made)), "two phases ran at once"


def test_side_by_side_pays():
    last = {}
    for stream, beside, lag in MODES:
        made = simulate(graph.phases(stream=stream, evaluate_beside=beside, max_lag=lag), nothing_done())
        last[(stream, beside, lag) if lag else (stream, beside)] = made[-1][1]
    # An iteration: 23 s in turn; 6 s instead of 5 + 6 + 3 with followers; 4 s of evaluation hidden behind the next sampling.
    assert last[True, False] < last[False, False] - ITERATIONS * 7
    assert last[False, True] < last[False, False] - (ITERATIONS - 1) * 3
    assert last[True, True] < min(last[True, False], last[False, True])
    # 6 s of sampling and judging are hidden behind the training, but in the first iteration.
    assert last[True, True, 1] < last[True, True] - 4
    assert last[True, False, 1] < last[True, False] - 4


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("stream", "beside", "lag"), MODES)
def test_prompts_are_chosen_when_all_that_is_read_is_complete_and_before_they_are_sampled(stream, beside, lag, dynamic):
    """Killed and resumed, too."""
    rows = graph.phases(
        stream=stream, evaluate_beside=beside, max_lag=lag, dynamic=dynamic, select=True, reference_samples=not lag
    )
    for seed in range(5):
        at = {task: i for i, task in enumerate(killed_and_resumed(rows, seed))}
        for t in range(1, ITERATIONS + 1):
            assert at[t, "select"] < at[t, "sample"]
            assert lag or at[t, "select"] < at[t, "sample_reference"]
            assert t == 1 or at[t - 1, "sample"] < at[t, "select"], "what was sampled is known"
            version = graph.sampling_version(t, lag)
            assert version == 0 or at[version, "label"] < at[t, "select"], "what was judged is known"


@pytest.mark.parametrize("lag", [0, 1])
def test_with_dynamic_sampling_only_judging_follows(lag):
    made = simulate(graph.phases(stream=True, evaluate_beside=True, max_lag=lag, dynamic=True), nothing_done())
    when = {task: (start, end) for start, end, task in made}
    for t in range(1, ITERATIONS + 1):
        assert when[t, "label"][0] == when[t, "sample"][0]
        assert when[t, "annotate"][0] >= when[t, "label"][1], "nobody knows yet which prompts are left"


def test_with_lag_an_iteration_takes_as_long_as_the_longer_part():
    iterations = 20
    rows = graph.phases(stream=True, evaluate_beside=True, max_lag=1)
    made = simulate(rows, {t: set() for t in range(iterations + 1)})
    learner = sum(SECONDS[name] for name in ("annotate", "train", "checkpoint", "sync", "measure"))
    committed = {t: end for _, end, (t, name) in made if name == "commit"}
    assert (committed[18] - committed[8]) / 10 == pytest.approx(learner, rel=0.01)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("stream", "beside", "lag"), MODES)
def test_no_part_is_used_twice(stream, beside, lag, shared):
    rows = {row.name: row for row in graph.phases(stream=stream, evaluate_beside=beside, max_lag=lag)}
    for seed in range(20):
        made = simulate(list(rows.values()), nothing_done(), shared=shared, jitter=random.Random(seed))
        assert len(made) == ITERATIONS * len(NAMES) + 4
        for (start, end, one), (other_start, other_end, other) in combinations(made, 2):
            if start < other_end and other_start < end:
                a, b = rows[one[1]], rows[other[1]]
                assert not a.alone & (b.alone | b.shares), (one, other)
                assert not b.alone & (a.alone | a.shares), (one, other)
                if shared:
                    hardware = [{"engine", "learner"} & (row.alone | row.shares) for row in (a, b)]
                    assert not (hardware[0] and hardware[1] and hardware[0] != hardware[1]), (one, other)


@pytest.mark.parametrize(("stream", "beside", "lag"), MODES)
def test_killed_and_resumed_nothing_is_done_twice_and_no_weights_are_mixed(stream, beside, lag):
    rows = graph.phases(stream=stream, evaluate_beside=beside, max_lag=lag)
    for seed in range(100):
        made = killed_and_resumed(rows, seed)
        assert len(made) == len(set(made)) == ITERATIONS * len(NAMES) + 4
        check_weights(made, lag)


def killed_and_resumed(rows: Sequence[Phase], seed: int, latest: float = 40) -> list[Task]:
    """What has ended, in this order, of a run that is killed at random times."""
    chance, done, made = random.Random(seed), nothing_done(), list[Task]()
    while "commit" not in done[ITERATIONS]:
        made += [task for _, _, task in simulate(rows, done, until=chance.uniform(1, latest), jitter=chance)]
        assert graph.undone(rows, done) == done
    return made


def check_all(runs: Sequence[list[Task]], lag: int) -> None:
    for made in runs:
        check_weights(made, lag)


def check_weights(finished: list[Task], lag: int) -> None:
    """That whatever reads weights found those that it is about."""
    at = {task: i for i, task in enumerate(finished)}
    for t in range(1, ITERATIONS + 1):
        version = graph.sampling_version(t, lag)
        assert version == max(0, t - 1 - lag)
        assert at[version, "sync"] < at[t, "sample"] < at[version + 1, "sync"], "sampled by one version, the one that is meant"
        assert at[t - 1, "sync"] < at[t, "train"], "pushed while the learner holds its weights"
        assert at[t - 1, "answer"] < at[t, "sync"], "the answers of an iterate are its own"
        assert at[t - 1, "measure"] < at[t, "train"], "measured while the learner holds its weights"
        if t > 1:
            assert at[t - 1, "checkpoint"] < at[t, "annotate"] < at[t, "train"], (
                "scored by the weights that training starts from"
            )


@pytest.mark.parametrize(
    ("name", "edge", "said"),
    [
        ("sync", ("sample", -1), "sampled by one version"),
        ("annotate", ("checkpoint", 1), "scored by the weights"),
        ("train", ("measure", 1), "measured while"),
    ],
)
def test_with_lag_a_missing_edge_would_be_noticed(name, edge, said):
    """The faults that the simulation is there for, such as a push, after a resume, before the sampling phase that was under way has ended."""
    rows = tuple(
        replace(row, waits_for=tuple(each for each in row.waits_for if each != edge)) if row.name == name else row
        for row in graph.phases(stream=True, evaluate_beside=True, max_lag=1)
    )
    assert rows != graph.phases(stream=True, evaluate_beside=True, max_lag=1)
    runs = [killed_and_resumed(rows, seed, latest=12) for seed in range(100)]
    with pytest.raises(AssertionError, match=said):
        check_all(runs, 1)


def test_more_iterations_with_lag_are_sampled_by_the_versions_that_they_would_have_been_sampled_by():
    """The newest weights were pushed without waiting for an iteration that nobody had asked for: they are pushed again, after it."""
    rows = graph.phases(stream=True, evaluate_beside=True, max_lag=1)
    done = {t: set() for t in range(3)}
    made = simulate(rows, done)
    done |= {t: set() for t in range(3, ITERATIONS + 1)}
    assert graph.undone(graph.phases(stream=True, evaluate_beside=True), done) == done, "without lag nothing is done again"
    again = graph.undone(rows, done)
    assert {t: done[t] - again[t] for t in done} == {0: set(), 1: set(), 2: {"sync", "commit"}, 3: set(), 4: set()}
    kept = [task for _, _, task in made if task[1] in again[task[0]]]
    check_weights([*kept, *(task for _, _, task in simulate(rows, again))], 1)


def test_rows_that_wait_for_each_other_are_an_error_and_no_hang():
    with pytest.raises(ConfigError, match="no phase of iteration 2 can start"):
        graph.require_running([], [2, 3])
    graph.require_running([(2, "sample")], [2, 3])


def test_a_phase_starts_only_when_what_it_follows_has_begun():
    rows = graph.phases(stream=True, evaluate_beside=False)
    done = {0: {"sync", "answer", "measure", "commit"}, 1: set()}
    assert list(graph.ready(rows, [1], done, [])) == [(1, "sample")]
    assert list(graph.ready(rows, [1], done, [(1, "sample")])) == [(1, "label")]
    assert list(graph.ready(rows, [1], done, [(1, "sample"), (1, "label")])) == [(1, "annotate")]
    assert list(graph.ready(rows, [1], done, [(1, "sample"), (1, "label")], shared_hardware=True)) == [], (
        "the engine has the GPU"
    )


# --- known pairs ---


@pytest.mark.parametrize(("stream", "beside", "lag"), MODES)
def test_the_oracle_is_examined_before_anything_is_pushed_or_sampled(stream, beside, lag):
    rows = graph.phases(stream=stream, evaluate_beside=beside, max_lag=lag, anchors=True)
    for seed in range(20):
        made = simulate(rows, nothing_done(), jitter=random.Random(seed))
        assert len(made) == (ITERATIONS + 1) * len(rows) - len([row for row in rows if not row.of_base])
        ends, starts = ({task: span[place] for *span, task in made} for place in (1, 0))
        assert ends[0, "examine"] <= starts[0, "sync"]
        assert all(ends[t, "examine"] <= starts[t, "sample"] for t in range(1, ITERATIONS + 1))
    made = killed_and_resumed(rows, seed=1)
    assert len(made) == len(set(made))
    check_weights(made, lag)


# --- an oracle that is trained between iterations ---


@pytest.mark.parametrize(("stream", "beside", "lag"), MODES)
def test_who_asks_for_an_iteration_asks_the_version_that_the_one_before_has_left(stream, beside, lag):
    """And nobody asks while the oracle is being trained, in any schedule."""
    rows = graph.phases(stream=stream, evaluate_beside=beside, max_lag=lag, anchors=True, refresh=True)
    asking = {row.name for row in rows if "oracle" in row.shares}
    assert asking == {"examine", "label", "measure"}
    for seed in range(20):
        made = simulate(rows, nothing_done(), jitter=random.Random(seed))
        assert len(made) == (ITERATIONS + 1) * len(rows) - len([row for row in rows if not row.of_base])
        ends, starts = ({task: span[place] for *span, task in made} for place in (1, 0))
        for t in range(1, ITERATIONS + 1):
            assert ends[t, "measure"] <= starts[t, "refresh"]
            assert ends[t, "refresh"] <= starts[t, "commit"]
            for later in range(t + 1, ITERATIONS + 1):
                assert all(ends[t, "refresh"] <= starts[later, name] for name in ("label", "measure"))
                assert (ends[t, "refresh"] <= starts[later, "examine"]) == (later > t + lag), (
                    "known before, whatever runs beside"
                )
        for start, end, (t, name) in made:
            if name in asking:
                beside_it = [s for s, e, (_, other) in made if other == "refresh" and s < end and start < e]
                assert beside_it == [], (t, name)


@pytest.mark.parametrize(("stream", "beside", "lag"), MODES)
def test_killed_and_resumed_the_oracle_is_trained_once_an_iteration(stream, beside, lag):
    rows = graph.phases(stream=stream, evaluate_beside=beside, max_lag=lag, refresh=True)
    for seed in range(50):
        made = killed_and_resumed(rows, seed)
        assert len(made) == len(set(made)) == ITERATIONS * len(rows) + 4
        check_weights(made, lag)
        at = {task: i for i, task in enumerate(made)}
        assert all(at[t - 1, "refresh"] < at[t, "label"] for t in range(2, ITERATIONS + 1))


def test_who_did_not_wait_for_the_new_version_would_be_noticed():
    """The fault that the row of `label` is there for: verdicts of an iteration by two versions."""
    rows = tuple(
        replace(row, waits_for=tuple(each for each in row.waits_for if each != ("refresh", 1)))
        for row in graph.phases(stream=True, evaluate_beside=True, refresh=True)
    )
    early = []
    for seed in range(20):
        at = {task: i for i, task in enumerate(killed_and_resumed(rows, seed))}
        early += [t for t in range(2, ITERATIONS + 1) if at[t, "label"] < at[t - 1, "refresh"]]
    assert early


def test_dynamic_sampling_beside_an_evaluation_gets_its_verdicts_from_the_new_version():
    rows = graph.phases(stream=True, evaluate_beside=True, dynamic=True, refresh=True)
    made = simulate(rows, nothing_done())
    when = {task: (start, end) for start, end, task in made}
    for t in range(2, ITERATIONS + 1):
        assert when[t, "sample"][0] < when[t - 1, "refresh"][0], "the engine does not wait"
        assert when[t - 1, "refresh"][1] <= when[t, "label"][0]


# --- responses of the base model ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("stream", "beside"), [(False, False), (False, True), (True, False), (True, True)])
def test_nothing_uses_engine_or_learner_while_the_engine_holds_the_base_model(stream, beside, shared):
    rows = {row.name: row for row in graph.phases(stream=stream, evaluate_beside=beside, reference_samples=True)}
    assert [*rows] == ["sample_reference", *NAMES]
    for seed in range(20):
        made = simulate(list(rows.values()), nothing_done(), shared=shared, jitter=random.Random(seed))
        assert len(made) == ITERATIONS * len(rows) + 4
        lent = [(start, end, t) for start, end, (t, name) in made if name == "sample_reference"]
        for start, end, t in lent:
            beside_it = [name for s, e, (_, name) in made if s < end and start < e and name != "sample_reference"]
            assert all(not {"engine", "learner"} & (rows[name].alone | rows[name].shares) for name in beside_it), beside_it
            finished = [task for _, _, task in made]
            assert finished.index((t - 1, "sync")) < finished.index((t, "sample_reference")) < finished.index((t, "sample"))


@pytest.mark.parametrize("beside", [False, True])
def test_killed_and_resumed_the_base_model_is_sampled_once_and_first(beside):
    rows = graph.phases(stream=True, evaluate_beside=beside, reference_samples=True)
    for seed in range(50):
        made = killed_and_resumed(rows, seed)
        assert len(made) == len(set(made)) == ITERATIONS * len(rows) + 4
        check_weights(made, 0)
        assert all(made.index((t, "sample_reference")) < made.index((t, "sample")) for t in range(1, ITERATIONS + 1))
