"""Asks engine and oracle for what is not on disk yet: every answer is durable before it is used, so nothing is asked twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Protocol

from onlinerl.controller import health
from onlinerl.controller.asking import Asker
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.tally import Lost, Paid, Sampled, is_final
from onlinerl.protocols.store import REFRESH_LABELS, VERDICTS, Table
from onlinerl.types import Failure, Group, Label, Query, Request, Sampling, Verdict


class Groups(Protocol):
    """Where groups come from."""

    def take(self, most: int) -> Sequence[Group]:
        """At least one and at most so many, as soon as there are any; none at the end."""
        ...


def generate(
    it: Iteration,
    requests: Sequence[Request],
    sampling: Sampling,
    table: Table[Group],
    phase: str,
    *,
    version: int,
    feed: Feed[str] | None = None,
    more: Callable[[Mapping[str, Sampled]], Sequence[Request]] = lambda sampled: (),
    joined: Callable[[Sequence[Group]], Sequence[Group]] = lambda groups: groups,
) -> list[Sampled]:
    """What was sampled for each request, in their order; only groups that are not in the table yet are generated.

    Until the table is complete, a group with rejected responses is asked for again, so a repaired engine gets its chance. The id of each
    prompt goes to `feed` too, once its group is on disk for good.

    Args:
        it: the iteration.
        requests: one per prompt.
        sampling: of the responses that are drawn.
        table: where the groups are kept.
        phase: that asks.
        version: of the weights that the engine must have.
        feed: who follows.
        more: when all is there, it is told what was sampled by prompt, and says what else to generate, until that is nothing.
        joined: adds to groups what other responses to their prompts there are, before they are kept.
    """
    tracker = it.parts.tracker
    complete = table.sealed
    sampled = {group.prompt.id: Sampled.of(group) for group in table if complete or not group.rejected}
    if feed is not None:
        feed.put(sampled)
    known = frozenset(sampled)
    rejected = Counter(reason for s in sampled.values() for reason in s.rejected)
    requests = list(requests)
    while True:
        seeds = {r.prompt.id: len(r.seeds) for r in requests}
        asked = sum(seeds.values())
        todo = [r for r in requests if r.prompt.id not in sampled]
        by_id = {r.prompt.id: r for r in todo}
        tracker.phase_started(it.number, phase, asked, "samples")
        tracker.phase_advanced(it.number, phase, sum(seeds[prompt_id] for prompt_id in sampled if prompt_id in seeds))
        for made in it.parts.engine.generate(todo, sampling) if todo else ():
            health.check_groups(made, version)
            health.check_sources(made, by_id, sampling)
            groups = joined(made)
            table.append(groups)
            new = {group.prompt.id: Sampled.of(group) for group in groups}
            sampled |= new
            if feed is not None:
                feed.put(prompt_id for prompt_id, one in new.items() if not one.rejected)
            tracker.phase_advanced(it.number, phase, sum(seeds[prompt_id] for prompt_id in new))
            rejected.update(reason for one in new.values() for reason in one.rejected)
            health.check_rejected(rejected, asked, it.parts.config.engine.max_rejected)
            it.check_stop()
        added = more(sampled)
        if not added:
            break
        requests += added
    table.seal()
    if feed is not None:  # until now a resume would have asked for these again, and nobody may judge what can still change
        feed.put(r.prompt.id for r in requests if r.prompt.id not in known and sampled[r.prompt.id].rejected)
    return [sampled[r.prompt.id] for r in requests]


def judge(
    it: Iteration,
    groups: Groups,
    expected: int,
    table: str,
    phase: str,
    *,
    wanted: Callable[[Group], bool] = lambda group: True,
    feed: Feed[str] | None = None,
    anew: bool = False,
    asker: Asker | None = None,
) -> tuple[int, Paid]:
    """How many verdicts the table holds in the end, and what they and the failures have cost; only those that it does not hold yet, and
    that the ledger does not know, are asked for.

    A failure is no answer: until the table is complete it is asked for again, so a repaired oracle gets its chance. So is a verdict of which
    replies have failed; an oracle that keeps its replies asks for those alone. Nobody works on such a one while it can still change, but for
    dynamic sampling, which cannot wait.

    Args:
        it: the iteration.
        groups: as they come.
        expected: how many will come, at least.
        table: name of the one in which the answers are kept.
        phase: that asks.
        wanted: which groups are judged at all.
        feed: gets the id of every prompt whose group was dealt with, once what is known about it is on disk.
        anew: ask about those that the ledger knows, too.
        asker: who asks; that of the run by default.
    """
    tracker, asker, limit = it.parts.tracker, asker or it.parts.asker, it.parts.config.max_failed_labels
    labels = it.parts.store.labels(it.number, table)
    paid, lost, judged, again = _stored(labels)
    expected = max(expected, len(judged))
    tracker.phase_started(it.number, phase, expected, "groups")
    tracker.phase_advanced(it.number, phase, len(judged))
    about = partial(Query, iteration=it.number, heldout=table not in (VERDICTS, REFRESH_LABELS))
    unjudged = _Unjudged(groups, frozenset(judged), wanted, feed, about)
    failures, held = list[Failure](), list[str]()
    try:
        for arrived in asker.labels(unjudged, it.stop, anew=lambda query: anew or query.prompt.id in again):
            labels.append([label for _, label in arrived])
            asker.recorded(it.number, table, arrived)
            judged.update(query.prompt.id for query, _ in arrived)
            for _, label in arrived:
                paid = paid.plus(label)
                lost.add(label)
            if feed is not None:
                changing = {label.prompt_id for _, label in arrived if _may_change(label)} if not it.dynamic else set()
                held += changing
                feed.put(query.prompt.id for query, _ in arrived if query.prompt.id not in changing)
            tracker.phase_advanced(it.number, phase, len(arrived))
            expected = max(expected, len(judged))
            new = [label.result for _, label in arrived if isinstance(label.result, Failure)]
            failures += new
            if new:
                it.report.asked(it.number, phase, len(failures), expected)
            health.check_failures(failures, expected, limit)
            health.check_replies(lost, expected, limit)
        # Fewer may have come than expected, and nothing is asked again once the table is complete.
        health.check_failures(failures, len(judged), limit)
        health.check_replies(lost, lost.groups, limit)
    finally:
        it.report.replies(it.number, phase, lost)
    if not failures:
        it.report.asked(it.number, phase, 0, expected)
    labels.seal()
    if feed is not None:
        feed.put(held)
    return len(judged), paid


def _stored(labels: Table[Label]) -> tuple[Paid, Lost, set[str], set[str]]:
    """What the labels of a table have cost and lost, which prompts need not be asked about any more, and which are asked about again."""
    paid, lost, judged, again = Paid(), Lost(), set[str](), set[str]()
    complete = labels.sealed
    for label in labels:
        paid = paid.plus(label)
        if complete or is_final(label):
            judged.add(label.prompt_id)
            lost.add(label)
        else:
            again.add(label.prompt_id)
            lost.kinds |= label.result.replies.failed.keys()
    return paid, lost, judged, again


def _may_change(label: Label) -> bool:
    """Whether it says something now, and a resume may ask again."""
    return isinstance(label.result, Verdict) and not is_final(label)


class _Unjudged:
    """The questions about groups that still have to be judged, as they come; the others are handed on."""

    def __init__(
        self,
        groups: Groups,
        known: Container[str],
        wanted: Callable[[Group], bool],
        feed: Feed[str] | None,
        query: Callable[..., Query],
    ) -> None:
        self._groups, self._known, self._wanted, self._feed, self._query = groups, known, wanted, feed, query

    def take(self, most: int) -> list[Query]:
        """At least one and at most so many, as soon as there are any; none at the end."""
        while groups := self._groups.take(most):
            todo = [g for g in groups if self._is_open(g)]
            if self._feed is not None:
                self._feed.put(g.prompt.id for g in groups if not self._is_open(g))
            if todo:
                return [self._query(prompt=g.prompt, responses=tuple(r.text for r in g.rollouts)) for g in todo]
        return []

    def _is_open(self, group: Group) -> bool:
        return group.prompt.id not in self._known and self._wanted(group)
