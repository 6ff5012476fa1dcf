"""Asks engine and oracle for what is not on disk yet: every answer is durable before it is used, so nothing is asked twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onlinerl.controller import health
from onlinerl.controller.asking import answers
from onlinerl.controller.iteration import Iteration
from onlinerl.stores.rows import group_from_row, group_row, result_from_row, result_row
from onlinerl.types import Failure, Group, Query, Request, Sampling, Verdict


def generate(it: Iteration, requests: Sequence[Request], sampling: Sampling, table: str, phase: str) -> list[Group]:
    """All groups of a table, in the order of the requests; only those not on disk yet are generated.

    Until the table is complete, a group with rejected responses is asked for again, so a repaired engine gets its chance.
    """
    store, tracker = it.parts.store, it.parts.tracker
    by_id = {r.prompt.id: r.prompt for r in requests}
    stored = [group_from_row(row, by_id) for row in store.read(it.number, table)]
    groups = {g.prompt.id: g for g in stored if not g.rejected or store.sealed(it.number, table)}
    asked = sum(len(r.seeds) for r in requests)
    rejected = Counter(reason for g in groups.values() for reason in g.rejected)
    todo = [r for r in requests if r.prompt.id not in groups]
    tracker.phase_started(it.number, phase, asked, "samples")
    tracker.phase_advanced(it.number, phase, sum(len(g.rollouts) for g in groups.values()))
    for group in it.parts.engine.generate(todo, sampling) if todo else ():
        health.check_group(group, it.weights.learner)
        store.append(it.number, table, [group_row(group)])
        groups[group.prompt.id] = group
        tracker.phase_advanced(it.number, phase, len(group.rollouts) + len(group.rejected))
        rejected.update(group.rejected)
        health.check_rejected(rejected, asked, it.parts.config.engine.max_rejected)
    store.seal(it.number, table)
    return [groups[r.prompt.id] for r in requests]


def judge(it: Iteration, groups: Sequence[Group], table: str, phase: str) -> tuple[int, dict[str, Verdict | Failure]]:
    """Verdicts by prompt id, and how many of them exist; only those not on disk yet are asked for (R-G1).

    A failure is no answer: until the table is complete it is asked for again, so a repaired oracle gets its chance.
    """
    store, tracker = it.parts.store, it.parts.tracker
    results = dict(result_from_row(row) for row in store.read(it.number, table))
    if not store.sealed(it.number, table):
        results = {prompt_id: result for prompt_id, result in results.items() if isinstance(result, Verdict)}
    todo = [g for g in groups if g.prompt.id not in results]
    tracker.phase_started(it.number, phase, len(groups), "groups")
    tracker.phase_advanced(it.number, phase, len(results))
    queries = [Query(prompt=g.prompt, responses=tuple(r.text for r in g.rollouts)) for g in todo]
    failures: list[Failure] = []
    for arrived in answers(it.parts.oracle, queries):
        store.append(it.number, table, [result_row(query.prompt.id, result) for query, result in arrived])
        results.update({query.prompt.id: result for query, result in arrived})
        tracker.phase_advanced(it.number, phase, len(arrived))
        new = [result for _, result in arrived if isinstance(result, Failure)]
        failures += new
        if new:
            it.report.asked(it.number, phase, len(failures), len(groups))
        health.check_failures(failures, len(groups), it.parts.config.max_failed_labels)
    if not failures:
        it.report.asked(it.number, phase, 0, len(groups))
    store.seal(it.number, table)
    return len(results), results
