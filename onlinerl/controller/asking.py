"""Asking the oracle what one phase or several want to know, in as many calls at a time as it allows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onlinerl.controller.feed import LOOK_S, Feed, Stopped
from onlinerl.oracle_calls import Answers, call
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Query


def answers(oracle: Oracle, queries: Sequence[Query]) -> Iterator[Answers]:
    """`Asker.answers` for queries that are all there."""
    stop = threading.Event()
    return Asker(oracle).answers(Feed.of(queries, stop), stop)


class Questions(Protocol):
    """Where questions come from."""

    def take(self, most: int) -> Sequence[Query]:
        """At least one and at most so many, as soon as there are any; none at the end. Any thread may call it."""
        ...


class Asker:
    """Asks one oracle, from any number of phases at a time; never with more than `oracle.max_concurrent` calls at once."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self._slots = threading.BoundedSemaphore(oracle.max_concurrent)

    def answers(self, questions: Questions, stop: threading.Event) -> Iterator[Answers]:
        """Every question with its result, in lists of what has arrived since the last one; in order, if calls are made one by one.

        Questions go out in calls of up to `oracle.groups_per_call`; see `oracle_calls.call` for deadlines and further tries. A call goes
        on only after what it has given was taken care of here.

        Raises:
            OracleError: as the oracle raised it: something is wrong that no other group would go better with.
        """
        arrivals: queue.SimpleQueue[_Arrival | _End] = queue.SimpleQueue()
        over = threading.Event()
        workers = self.oracle.max_concurrent
        for _ in range(workers):
            threading.Thread(target=self._work, args=(questions, arrivals, over, stop), name="asking", daemon=True).start()
        try:
            while workers:
                arrival = arrivals.get()
                if isinstance(arrival, _Arrival):
                    yield arrival.answers
                    arrival.taken.set()
                elif arrival.error is not None:
                    raise arrival.error
                else:
                    workers -= 1
        finally:
            over.set()

    def _work(
        self,
        questions: Questions,
        arrivals: queue.SimpleQueue[_Arrival | _End],
        over: threading.Event,
        stop: threading.Event,
    ) -> None:
        try:
            while not over.is_set() and (batch := questions.take(self.oracle.groups_per_call)):
                with self._slots:
                    for answers in call(self.oracle, batch):
                        arrival = _Arrival(answers)
                        arrivals.put(arrival)
                        while not arrival.taken.wait(LOOK_S):
                            if over.is_set() or stop.is_set():
                                raise Stopped
        except BaseException as error:  # noqa: BLE001  (raised again where the answers are waited for)
            arrivals.put(_End(error))
        else:
            arrivals.put(_End(None))


@dataclass(frozen=True)
class _Arrival:
    answers: Answers
    taken: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _End:
    """Nothing more will come from the thread."""

    error: BaseException | None
