"""Asks engine and oracle for what is not on disk yet: every answer is durable before it is used, so nothing is asked twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from onlinerl.controller import health
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.stores.rows import group_from_row, group_row, result_from_row, result_row
from onlinerl.types import Failure, Group, Query, Request, Sampling, Verdict


def generate(
    it: Iteration, requests: Sequence[Request], sampling: Sampling, table: str, phase: str, *, feed: Feed[Group] | None = None
) -> list[Group]:
    """All groups of a table, in the order of the requests; only those not on disk yet are generated.

    Until the table is complete, a group with rejected responses is asked for again, so a repaired engine gets its chance. Each group
    goes to `feed` too, once it is on disk for good.
    """
    store, tracker = it.parts.store, it.parts.tracker
    by_id = {r.prompt.id: r.prompt for r in requests}
    stored = [group_from_row(row, by_id) for row in store.read(it.number, table)]
    groups = {g.prompt.id: g for g in stored if not g.rejected or store.sealed(it.number, table)}
    if feed is not None:
        feed.put(groups.values())
    asked = sum(len(r.seeds) for r in requests)
    rejected = Counter(reason for g in groups.values() for reason in g.rejected)
    todo = [r for r in requests if r.prompt.id not in groups]
    tracker.phase_started(it.number, phase, asked, "samples")
    tracker.phase_advanced(it.number, phase, sum(len(g.rollouts) for g in groups.values()))
    for group in it.parts.engine.generate(todo, sampling) if todo else ():
        health.check_group(group, it.number if phase == "answer" else it.sampling_version)
        store.append(it.number, table, [group_row(group)])
        groups[group.prompt.id] = group
        if feed is not None and not group.rejected:
            feed.put([group])
        tracker.phase_advanced(it.number, phase, len(group.rollouts) + len(group.rejected))
        rejected.update(group.rejected)
        health.check_rejected(rejected, asked, it.parts.config.engine.max_rejected)
        it.check_stop()
    store.seal(it.number, table)
    if feed is not None:  # until now a resume would have asked for these again, and nobody may judge what can still change
        feed.put(groups[r.prompt.id] for r in todo if groups[r.prompt.id].rejected)
    return [groups[r.prompt.id] for r in requests]


def judge(
    it: Iteration,
    groups: Feed[Group],
    expected: int,
    table: str,
    phase: str,
    *,
    wanted: Callable[[Group], bool] = lambda group: True,
    feed: Feed[tuple[Group, Verdict | Failure | None]] | None = None,
) -> tuple[int, dict[str, Verdict | Failure]]:
    """Verdicts by prompt id, and how many of them exist; only those not on disk yet are asked for.

    A failure is no answer: until the table is complete it is asked for again, so a repaired oracle gets its chance.

    Args:
        it: the iteration.
        groups: as they come.
        expected: how many will come.
        table: where the answers are kept.
        phase: that asks.
        wanted: which groups are judged at all.
        feed: gets every group with what is known about it, once that is on disk.
    """
    store, tracker = it.parts.store, it.parts.tracker
    results = dict(result_from_row(row) for row in store.read(it.number, table))
    if not store.sealed(it.number, table):
        results = {prompt_id: result for prompt_id, result in results.items() if isinstance(result, Verdict)}
    tracker.phase_started(it.number, phase, expected, "groups")
    tracker.phase_advanced(it.number, phase, len(results))
    unjudged = _Unjudged(groups, {**results}, wanted, feed)
    failures: list[Failure] = []
    for arrived in it.parts.asker.answers(unjudged, it.stop):
        store.append(it.number, table, [result_row(query.prompt.id, result) for query, result in arrived])
        results.update({query.prompt.id: result for query, result in arrived})
        if feed is not None:
            feed.put([(unjudged.asked[query.prompt.id], result) for query, result in arrived])
        tracker.phase_advanced(it.number, phase, len(arrived))
        new = [result for _, result in arrived if isinstance(result, Failure)]
        failures += new
        if new:
            it.report.asked(it.number, phase, len(failures), expected)
        health.check_failures(failures, expected, it.parts.config.max_failed_labels)
    if not failures:
        it.report.asked(it.number, phase, 0, expected)
    store.seal(it.number, table)
    return len(results), results


class _Unjudged:
    """The questions about groups that still have to be judged, as they come; the others are handed on."""

    def __init__(
        self,
        groups: Feed[Group],
        known: Mapping[str, Verdict | Failure],
        wanted: Callable[[Group], bool],
        feed: Feed[tuple[Group, Verdict | Failure | None]] | None,
    ) -> None:
        self._groups, self._known, self._wanted, self._feed = groups, known, wanted, feed
        self.asked: dict[str, Group] = {}

    def take(self, most: int) -> list[Query]:
        """At least one and at most so many, as soon as there are any; none at the end."""
        while groups := self._groups.take(most):
            todo = [g for g in groups if self._is_open(g)]
            if self._feed is not None:
                self._feed.put((g, self._known.get(g.prompt.id)) for g in groups if not self._is_open(g))
            if todo:
                self.asked.update({g.prompt.id: g for g in todo})
                return [Query(prompt=g.prompt, responses=tuple(r.text for r in g.rollouts)) for g in todo]
        return []

    def _is_open(self, group: Group) -> bool:
        return group.prompt.id not in self._known and self._wanted(group)
