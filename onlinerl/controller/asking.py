"""Asking the oracle what one phase or several want to know, in as many calls at a time as it allows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Generic, Protocol, TypeVar

from onlinerl.budget import Account
from onlinerl.controller.feed import LOOK_S, Feed, Stopped
from onlinerl.errors import BudgetError
from onlinerl.oracle_calls import Answers, Caller, call
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.store import Ledger
from onlinerl.types import Label, Query, Verdict, label_key

T = TypeVar("T")
Labels = list[tuple[Query, Label]]


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
    """Asks one oracle, from any number of phases at a time; never with more than `oracle.max_concurrent` calls at once.

    Args:
        oracle: that is asked.
        ledger: what is judged already; None: nothing.
        account: what may be paid; None: anything.
    """

    def __init__(self, oracle: Oracle, ledger: Ledger | None = None, account: Account | None = None) -> None:
        self.oracle = oracle
        self._ledger = ledger
        self._caller = Caller(oracle, account)
        self._slots = threading.BoundedSemaphore(oracle.max_concurrent)

    @property
    def account(self) -> Account:
        """Of whoever pays for the answers."""
        return self._caller.account

    def labels(
        self, questions: Questions, stop: threading.Event, *, anew: Callable[[Query], bool] = lambda query: False
    ) -> Iterator[Labels]:
        """As `answers`, but what the ledger knows is not asked, unless `anew`, and nothing is asked that the account cannot pay.

        Raises:
            BudgetError: if the next question may be too expensive.
            OracleError: as `answers`.
        """
        if self._ledger is not None:
            self._ledger.look_again()
        return self._each(questions, stop, partial(self._labelled, over=stop.is_set, anew=anew))

    def recorded(self, iteration: int, table: str, labels: Labels) -> None:
        """These are on the disk: whoever asks the same again is told what they say."""
        if self._ledger is not None:
            self._ledger.add(iteration, table, [label for _, label in labels])
        if asked := [(query, label.result) for query, label in labels if label.reused_from is None]:
            self.oracle.recorded(asked)

    def beside(self, oracle: Oracle) -> Asker:
        """Who asks another oracle, with the same ledger and account."""
        return Asker(oracle, self._ledger, self.account)

    def renewed(self) -> None:
        """The oracle has another version from now on: what the one before said is no answer any more."""
        self.__dict__.pop("_version", None)

    @cached_property
    def _version(self) -> str:
        return self.oracle.version

    def _labelled(self, batch: Sequence[Query], over: Callable[[], bool], anew: Callable[[Query], bool]) -> Iterator[Labels]:
        keys = [label_key(query, self._version) if self._ledger is not None else "" for query in batch]
        known = [
            None if self._ledger is None or anew(query) else self._ledger.find(key)
            for query, key in zip(batch, keys, strict=True)
        ]
        if found := [(query, self._as_now(label)) for query, label in zip(batch, known, strict=True) if label is not None]:
            yield found
        asked = [(query, key) for query, key, label in zip(batch, keys, known, strict=True) if label is None]
        in_order = iter([key for _, key in asked])
        for answers in self._caller.call([query for query, _ in asked], over) if asked else ():
            yield [(q, Label(prompt_id=q.prompt.id, result=said, key=next(in_order))) for q, said in answers]

    def _as_now(self, label: Label) -> Label:
        assert isinstance(label.result, Verdict)
        return replace(label, result=replace(label.result, temperature=self.oracle.preference_temperature))

    def answers(self, questions: Questions, stop: threading.Event) -> Iterator[Answers]:
        """Every question with its result, in lists of what has arrived since the last one; in order, if calls are made one by one.

        Questions go out in calls of up to `oracle.groups_per_call`; see `oracle_calls.call` for deadlines and further tries. A call goes
        on only after what it has given was taken care of here.

        Raises:
            OracleError: as the oracle raised it: something is wrong that no other group would go better with.
        """
        return self._each(questions, stop, partial(call, self.oracle))

    def _each(
        self, questions: Questions, stop: threading.Event, ask: Callable[[Sequence[Query]], Iterator[list[T]]]
    ) -> Iterator[list[T]]:
        """What comes of every question, by calls in threads of their own. When the budget is reached, calls that are under way are waited
        for, because they are paid."""
        arrivals: queue.SimpleQueue[_Arrival[T] | _End] = queue.SimpleQueue()
        over = threading.Event()
        calls = _UnderWay()
        workers = self.oracle.max_concurrent
        for _ in range(workers):
            arguments = (questions, ask, arrivals, calls, over, stop)
            threading.Thread(target=self._work, args=arguments, name="asking", daemon=True).start()
        try:
            while workers:
                arrival = arrivals.get()
                if isinstance(arrival, _Arrival):
                    yield arrival.answers
                    arrival.taken.set()
                elif isinstance(arrival.error, BudgetError):
                    calls.refuse()
                    yield from _last(arrivals, calls)
                    raise arrival.error
                elif arrival.error is not None:
                    raise arrival.error
                else:
                    workers -= 1
        finally:
            over.set()

    def _work(
        self,
        questions: Questions,
        ask: Callable[[Sequence[Query]], Iterator[list[T]]],
        arrivals: queue.SimpleQueue[_Arrival[T] | _End],
        calls: _UnderWay,
        over: threading.Event,
        stop: threading.Event,
    ) -> None:
        try:
            while not over.is_set() and (batch := questions.take(self.oracle.groups_per_call)):
                with self._slots, calls.one_more() as allowed:
                    for answers in ask(batch) if allowed else ():
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
class _Arrival(Generic[T]):
    answers: list[T]
    taken: threading.Event = field(default_factory=threading.Event)


class _UnderWay:
    """How many calls are under way, and whether there may be more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._refuses = 0, False

    @contextmanager
    def one_more(self) -> Iterator[bool]:
        """A call, until the end of the block, if there may be one."""
        with self._lock:
            allowed = not self._refuses
            self._count += allowed
        try:
            yield allowed
        finally:
            with self._lock:
                self._count -= allowed

    def refuse(self) -> None:
        """There are to be no more."""
        with self._lock:
            self._refuses = True

    def __bool__(self) -> bool:
        with self._lock:
            return self._count > 0


def _last(arrivals: queue.SimpleQueue[_Arrival[T] | _End], calls: _UnderWay) -> Iterator[list[T]]:
    """What calls that are under way still give."""
    while calls or not arrivals.empty():
        try:
            arrival = arrivals.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        if isinstance(arrival, _Arrival):
            yield arrival.answers
            arrival.taken.set()


@dataclass(frozen=True)
class _End:
    """Nothing more will come from the thread."""

    error: BaseException | None
