"""A run as a graph of phases over durable tables: the table, as data.

A phase reads tables and weights, occupies one or two parts, writes a table or new weights, and ends in a record on disk. The loop
knows only this: start every phase whose inputs are there and whose parts are free. What differs between runs is the edges:

    phase        waits for                             may follow   uses                          writes
    sample t     commit t-1, or only sync t-1 (1)      -            engine (shared)               rollouts t
    label t      sample t                              sample t     oracle (shared)               verdicts t
    annotate t   label t, measure t-1 (2)              label t      learner                       logprobs t, pairs t
    train t      label t, annotate t (2)               -            learner                       weights t
    checkpoint t train t                               -            learner                       checkpoint t, export t
    sync t       checkpoint t, answer t-1 (3)          -            learner, engine               version t in every replica, proved
    answer t     sync t                                -            engine (shared)               answers t to the held-out prompts
    measure t    answer t, measure t-1                 -            learner, oracle (shared)      figures t
    commit t     measure t, commit t-1                 -            -                             what became of the iterate

The base model, iteration 0, is only pushed, measured and committed. The engine is shared by phases that read its weights and taken
alone by the one that writes them.

With dynamic sampling annotate t waits for label t: until then nobody knows which prompts are left.

Where the algorithm asks for responses of the base model, another phase comes first, and sample t waits for it:

    sample_reference t   as sample t                   -            learner, engine               reference_rollouts t
    sample_mixture t     as sample t                   -            learner                       mixture_rollouts t

The second one is where the algorithm asks for responses of a mixture of policy and reference, which the learner draws. The first one pushes the base model into every replica, samples, and pushes the policy back, so it takes learner and engine alone.

Where there are pairs whose better response is known (`anchors`), the oracle is examined by them; sync 0 and each sample t wait for it:

    examine t            as sample t                   -            oracle (shared)               anchor_verdicts t

Where a selector chooses the prompts, another phase comes before all of these, and what samples waits for it too. It reads what was judged of
iterations up to the one whose weights sample, and what the ones before have sampled:

    select t             as sample t                   -            -                             selection t

Where the oracle gets other weights between iterations, by a training or because the policy judges itself, that is a phase too; commit t waits for it, and whoever asks the oracle
for iteration t+1, label and examine (the latter with lag for t+2: what samples beside the training waits for it):

    refresh t            measure t                     -            oracle                        refresh_labels t, weights of the oracle

With `max_lag: 1` iteration t is sampled while t-1 trains, so from the weights of t-2. Only these edges differ:

(1) sample t waits for the same phase of t-2, and for sample t-1, which says where its prompts begin.
(2) annotate t waits for checkpoint t-1 only; train t, which changes the weights, for measure t-1 and sync t-1, which read them.
(3) sync t waits for sample t+1 too: a sampling phase ends with the version that it began with. Where that is sampled only after a
    sync t that could not know of it, as when a run gets more iterations, sync t and commit t are done again (see `undone`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onlinerl.errors import ConfigError

Part = Literal["engine", "oracle", "learner"]
Task = tuple[int, str]
"""A phase of an iteration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One row of the table."""

    name: str
    waits_for: tuple[tuple[str, int], ...] = ()
    """Phases that must be finished, each with how many iterations back it is: of a later one, if that is negative. What lies before the
    base model is waited for there; a phase that an iteration does not have, and an iteration that there is not, are no obstacle."""
    follows: str | None = None
    """A phase of the same iteration whose rows are taken as they become durable: it must have begun, instead of being finished."""
    alone: frozenset[Part] = frozenset()
    """Parts that no other phase may use meanwhile."""
    shares: frozenset[Part] = frozenset()
    """Parts that phases which share them may use at the same time."""
    of_base: bool = False
    """Whether the base model, iteration 0, goes through it too."""
    keeps: bool = False
    """Whether it goes on where it was stopped; otherwise it begins again."""
    function: str = ""
    """Dotted path, `package.module:function`, of a phase that is not in onlinerl.controller.phases."""


def phases(
    *,
    stream: bool,
    evaluate_beside: bool,
    max_lag: int = 0,
    dynamic: bool = False,
    reference_samples: bool = False,
    mixture_samples: bool = False,
    anchors: bool = False,
    select: bool = False,
    refresh: bool = False,
) -> tuple[Phase, ...]:
    """The graph, in the order in which an iteration goes through it if nothing runs side by side.

    Args:
        stream: labels follow the rollouts, and log-probs follow the labels.
        evaluate_beside: the next iteration samples while this one is evaluated.
        max_lag: how many iterations are trained while the next one is sampled: 0 or 1.
        dynamic: `sample` waits for what `label` says, so `label` follows it; which prompts are left is known when both are finished.
        reference_samples: the base model is sampled too; never with lag, where the learner trains meanwhile.
        mixture_samples: the learner samples too; the same holds.
        anchors: the oracle is examined by pairs whose better response is known.
        select: a selector chooses what is sampled, before anything is.
        refresh: the oracle gets other weights between iterations.
    """
    sampled_from = ("sync" if evaluate_beside else "commit", 1 + max_lag)
    lagging = max_lag > 0
    wanted = {"examine": anchors, "select": select, "sample_reference": reference_samples, "sample_mixture": mixture_samples}
    possible = _before_sampling(sampled_from, lagging=lagging, select=select, refresh=refresh)
    before = [phase for phase in possible if wanted[phase.name]]
    first = [(each.name, 0) for each in before]
    renewed = (("refresh", 1),) if refresh else ()  # the oracle has the version that the iteration before has left
    graph = (
        *before,
        Phase(
            name="sample",
            waits_for=(sampled_from, *([("sample", 1)] if lagging else []), *first),
            shares=frozenset({"engine"}),
            keeps=True,
        ),
        Phase(name="label", follows="sample", waits_for=renewed, shares=frozenset({"oracle"}), keeps=True),
        Phase(
            name="annotate",
            follows="label",
            waits_for=(("checkpoint" if lagging else "measure", 1),),
            alone=frozenset({"learner"}),
            keeps=True,
        ),
        Phase(
            name="train",
            waits_for=(("label", 0), ("annotate", 0), *([("measure", 1), ("sync", 1)] if lagging else [])),
            alone=frozenset({"learner"}),
        ),
        Phase(name="checkpoint", waits_for=(("train", 0),), alone=frozenset({"learner"})),
        *_of_new_weights(max_lag=max_lag, anchors=anchors, refresh=refresh),
    )
    return tuple(_in_turn(phase) if not stream or (dynamic and phase.follows == "label") else phase for phase in graph)


def _before_sampling(sampled_from: tuple[str, int], *, lagging: bool, select: bool, refresh: bool) -> tuple[Phase, ...]:
    """What some runs do before an iteration samples."""
    which = (("select", 0),) if select else ()
    renewed = (("refresh", sampled_from[1]),) if refresh else ()
    return (
        Phase(name="examine", waits_for=(sampled_from, *renewed), shares=frozenset({"oracle"}), of_base=True, keeps=True),
        Phase(name="select", waits_for=(sampled_from, *([("sample", 1)] if lagging else []))),
        Phase(name="sample_reference", waits_for=(sampled_from, *which), alone=frozenset({"learner", "engine"}), keeps=True),
        Phase(name="sample_mixture", waits_for=(sampled_from, *which), alone=frozenset({"learner"}), keeps=True),
    )


def _of_new_weights(*, max_lag: int, anchors: bool, refresh: bool) -> tuple[Phase, ...]:
    """Engines get them, and they are evaluated."""
    lagging = max_lag > 0
    return (
        Phase(
            name="sync",
            waits_for=(
                ("checkpoint", 0),
                ("answer", 1),
                *([("sample", -max_lag)] if lagging else []),
                *([("examine", 0)] if anchors else []),
            ),
            alone=frozenset({"learner", "engine"}),
            of_base=True,
        ),
        Phase(name="answer", waits_for=(("sync", 0),), shares=frozenset({"engine"}), of_base=True, keeps=True),
        Phase(
            name="measure",
            waits_for=(("answer", 0), ("measure", 1)),
            alone=frozenset({"learner"}),
            shares=frozenset({"oracle"}),
            of_base=True,
            keeps=True,
        ),
        *([Phase(name="refresh", waits_for=(("measure", 0),), alone=frozenset({"oracle"}), keeps=True)] if refresh else []),
        Phase(
            name="commit",
            waits_for=(
                ("measure", 0),
                ("commit", 1),
                *([("sync", 0)] if lagging else []),
                *([("refresh", 0)] if refresh else []),
            ),
            of_base=True,
        ),
    )


def sampling_version(iteration: int, max_lag: int) -> int:
    """Which weights an iteration is sampled from. The first one that lags has only the base model, like the one before it.

    >>> [sampling_version(t, 0) for t in (1, 2, 3)], [sampling_version(t, 1) for t in (1, 2, 3)]
    ([0, 1, 2], [0, 0, 1])
    """
    return max(0, iteration - 1 - max_lag)


def require_running(running: Collection[Task], unfinished: Sequence[int]) -> None:
    """Refuse to wait for ever, where rows of the graph wait for each other or for a phase that there is not.

    Raises:
        ConfigError: naming the iteration.
    """
    if not running:
        raise ConfigError(
            f"no phase of iteration {unfinished[0]} can start, and it is not finished",
            field="graph",
            fix="correct `waits_for` and `follows` of the rows: two of them wait for each other",
        )


def _in_turn(phase: Phase) -> Phase:
    """The same phase, but it begins when the one that it follows is finished."""
    if phase.follows is None:
        return phase
    return replace(phase, follows=None, waits_for=((phase.follows, 0), *phase.waits_for))


IN_FLIGHT = 3
"""Iterations that may be worked on at the same time: one trains, the next samples, and the last is being committed."""
PHASES = phases(stream=False, evaluate_beside=False)
"""The phases one after the other."""
NAMES = tuple(phase.name for phase in PHASES)


def of_iteration(graph: Sequence[Phase], iteration: int) -> tuple[Phase, ...]:
    """What an iteration goes through."""
    return tuple(phase for phase in graph if iteration > 0 or phase.of_base)


def ready(
    graph: Sequence[Phase],
    iterations: Sequence[int],
    done: Mapping[int, Collection[str]],
    running: Collection[Task],
    *,
    shared_hardware: bool = False,
) -> Iterator[Task]:
    """Phases that may start now, most urgent first. Whoever starts one looks again: it may have taken a part that another one needs.

    Args:
        graph: all phases.
        iterations: which of them may be worked on, ascending.
        done: names of the finished phases of every iteration.
        running: what has been started and is not finished.
        shared_hardware: engine and learner compute on the same GPUs or cores, so that only one of them works at a time.
    """
    rows = {phase.name: phase for phase in graph}
    for t in iterations:
        for phase in of_iteration(graph, t):
            if phase.name in done[t] or (t, phase.name) in running:
                continue
            waiting = [name for name, back in phase.waits_for if not _past(rows[name], _back(t, back), done)]
            begun = phase.follows is None or phase.follows in done[t] or (t, phase.follows) in running
            if not waiting and begun and not any(_conflict(phase, rows[name], shared_hardware) for _, name in running):
                yield t, phase.name


def _back(iteration: int, steps: int) -> int:
    """So many iterations back, but not beyond the base model, which itself waits for no other iteration (-1)."""
    if iteration == 0:
        return 0 if steps == 0 else -1
    return max(0, iteration - steps)


def _past(phase: Phase, iteration: int, done: Mapping[int, Collection[str]]) -> bool:
    missing = iteration not in done or (iteration == 0 and not phase.of_base)
    return missing or phase.name in done[iteration]


def undone(graph: Sequence[Phase], done: Mapping[int, set[str]]) -> dict[int, set[str]]:
    """`done`, without phases that had to wait for one of a later iteration which is not finished: it was asked for afterwards, or its
    files were removed. Their iterations are committed anew."""
    rows = {phase.name: phase for phase in graph}
    again = {
        t: {
            phase.name
            for phase in graph
            for name, back in phase.waits_for
            if back < 0 and not _past(rows[name], _back(t, back), done)
        }
        for t in done
    }
    return {t: names - again[t] - ({"commit"} if names & again[t] else set()) for t, names in done.items()}


def _conflict(one: Phase, other: Phase, shared_hardware: bool) -> bool:
    """Whether two phases cannot run at the same time."""
    if one.alone & (other.alone | other.shares) or one.shares & other.alone:
        return True
    hardware = frozenset({"engine", "learner"})
    mine, theirs = hardware & (one.alone | one.shares), hardware & (other.alone | other.shares)
    return shared_hardware and bool(mine and theirs and mine != theirs)
