"""Asking the oracle: a deadline for every answer, another try for what may pass, and each answer handed on when it is there.

The oracle's code runs in a thread of its own, so that one that never answers costs its groups and not the run. A thread cannot be
killed: one that missed its deadline is left to itself, and whatever it still says is ignored.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from itertools import count
from typing import Any, Generic, Literal, Protocol, TypeVar

from onlinerl import http_client
from onlinerl.budget import Account, largest
from onlinerl.controller.feed import LOOK_S, Feed, Stopped
from onlinerl.errors import BudgetError, OracleError
from onlinerl.protocols.oracle import Oracle
from onlinerl.protocols.store import Ledger
from onlinerl.types import Cost, Failure, Label, Query, Verdict, label_key

T = TypeVar("T")
Answers = list[tuple[Query, Verdict | Failure]]
Labels = list[tuple[Query, Label]]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
SHOWN_FRAMES = 3

# Base classes of what the usual HTTP clients (httpx, requests, urllib, the clients of model vendors) raise when a connection fails.
_PASSING_NAMES = frozenset({"TransportError", "Timeout", "URLError", "APIConnectionError"})


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
        self._ledger, self.account = ledger, account or Account()
        self._asks_the_account = account is not None and not oracle.charge(account)
        self._largest: dict[int, Cost] = {}
        """What a group of so many responses has cost at most."""
        self._slots = threading.BoundedSemaphore(oracle.max_concurrent)

    def labels(self, questions: Questions, stop: threading.Event) -> Iterator[Labels]:
        """As `answers`, but what the ledger knows is not asked, and nothing is asked that the account cannot pay.

        Raises:
            BudgetError: if the next question may be too expensive.
            OracleError: as `answers`.
        """
        if self._ledger is not None:
            self._ledger.look_again()
        return self._each(questions, stop, partial(self._labelled, over=stop.is_set))

    def recorded(self, iteration: int, table: str, labels: Labels) -> None:
        """These are on the disk: whoever asks the same again is told what they say."""
        if self._ledger is not None:
            self._ledger.add(iteration, table, [label for _, label in labels])
        if asked := [(query, label.result) for query, label in labels if label.reused_from is None]:
            self.oracle.recorded(asked)

    @cached_property
    def _version(self) -> str:
        return self.oracle.version

    def _labelled(self, batch: Sequence[Query], over: Callable[[], bool]) -> Iterator[Labels]:
        keys = [label_key(query, self._version) if self._ledger is not None else "" for query in batch]
        known = [None if self._ledger is None else self._ledger.find(key) for key in keys]
        if found := [(query, self._as_now(label)) for query, label in zip(batch, known, strict=True) if label is not None]:
            yield found
        asked = [(query, key) for query, key, label in zip(batch, keys, known, strict=True) if label is None]
        in_order = iter([key for _, key in asked])
        for answers in self._paid([query for query, _ in asked], over) if asked else ():
            yield [(q, Label(prompt_id=q.prompt.id, result=said, key=next(in_order))) for q, said in answers]

    def _as_now(self, label: Label) -> Label:
        assert isinstance(label.result, Verdict)
        return replace(label, result=replace(label.result, temperature=self.oracle.preference_temperature))

    def _paid(self, queries: Sequence[Query], over: Callable[[], bool]) -> Iterator[Answers]:
        """Answers that the account has paid for."""
        if not self._asks_the_account:
            yield from _call(self.oracle, queries)
            return
        most = reduce(Cost.plus, (self._most(len(query.responses)) for query in queries))
        if not self.account.wait(most, over):
            raise Stopped
        paid = Cost()
        try:
            for answers in _call(self.oracle, queries):
                for query, result in answers:
                    paid = paid.plus(result.cost)
                    k = len(query.responses)
                    self._largest[k] = largest(self._most(k), result.cost)
                yield answers
        finally:
            self.account.settle(most, paid)

    def _most(self, responses: int) -> Cost:
        """What a group costs, as far as it is known by now."""
        return self._largest.get(responses) or Cost(calls=self.oracle.requests(responses) or 1)

    def answers(self, questions: Questions, stop: threading.Event) -> Iterator[Answers]:
        """Every question with its result, in lists of what has arrived since the last one; in order, if calls are made one by one.

        Questions go out in calls of up to `oracle.groups_per_call`. An exception, or no answer within `oracle.call_timeout_s`, costs
        the questions of that call which were not answered yet. They are asked again, up to `oracle.retries` times, if the cause may
        pass: a missed deadline, a lost connection, HTTP 408, 425, 429 and 5xx (a Retry-After is kept to). After that each is a Failure.
        A call goes on only after what it has given was taken care of here.

        Raises:
            OracleError: as the oracle raised it: something is wrong that no other group would go better with.
        """
        return self._each(questions, stop, partial(_call, self.oracle))

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


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    """Why a call ended before every query was answered."""

    kind: Literal["error", "timeout"]
    message: str
    may_pass: bool
    wait_s: float | None = None
    """How long the other side asked to be left alone."""


@dataclass(frozen=True)
class _End:
    """Nothing more will come from the thread."""

    error: BaseException | None


def _call(oracle: Oracle, call: Sequence[Query]) -> Iterator[Answers]:
    waiting = deque(call)
    for tries in count(1):
        trouble = yield from _attempt(oracle, waiting)
        if trouble is None:
            return
        if not trouble.may_pass or tries > oracle.retries:
            yield [(query, Failure(kind=trouble.kind, message=trouble.message)) for query in waiting]
            return
        pause = FIRST_PAUSE_S * 2 ** (tries - 1) if trouble.wait_s is None else trouble.wait_s
        time.sleep(min(pause, LONGEST_PAUSE_S))


def _attempt(oracle: Oracle, waiting: deque[Query]) -> Generator[Answers, None, _Trouble | None]:
    """Take answered queries off `waiting`; returns what went wrong, or None if nothing did."""
    inbox: queue.SimpleQueue[list[Verdict | Failure] | _End] = queue.SimpleQueue()
    arguments = (oracle, tuple(waiting), inbox)
    threading.Thread(target=_ask, args=arguments, name="oracle", daemon=True).start()
    while True:
        try:
            arrived = [inbox.get(timeout=oracle.call_timeout_s)]
        except queue.Empty:
            message = f"{type(oracle).__name__} gave no answer within {oracle.call_timeout_s:g} s"
            return _Trouble(kind="timeout", message=message, may_pass=True)
        while not inbox.empty():
            arrived.append(inbox.get())
        results = [one for some in arrived if not isinstance(some, _End) for one in some]
        if results:
            yield [(waiting.popleft(), one) for one in results]
        if isinstance(end := arrived[-1], _End):
            if isinstance(end.error, OracleError):
                raise end.error
            return None if end.error is None else _trouble(oracle, end.error)


def _ask(oracle: Oracle, queries: Sequence[Query], inbox: queue.SimpleQueue[Any]) -> None:
    try:
        results = oracle.ask(queries)
        for known in [results] if isinstance(results, list) else ([result] for result in results):
            inbox.put(known)
    except BaseException as error:  # noqa: BLE001  (the oracle's code may raise anything; it is dealt with where it is waited for)
        inbox.put(_End(error))
    else:
        inbox.put(_End(None))


def _trouble(oracle: Oracle, error: BaseException) -> _Trouble:
    frames = "".join(traceback.format_tb(error.__traceback__)[-SHOWN_FRAMES:])
    said = "".join(traceback.format_exception_only(error)).strip()
    return _Trouble(
        kind="timeout" if isinstance(error, TimeoutError) else "error",
        message=f"{type(oracle).__name__} raised {said}\n{frames}".rstrip(),
        may_pass=_may_pass(error),
        wait_s=_retry_after(error),
    )


def _may_pass(error: BaseException) -> bool:
    """Whether the same question may be answered a little later."""
    status = _status(error)
    if status is not None:
        return status in http_client.PASSING or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, TimeoutError | ConnectionError) or not names.isdisjoint(_PASSING_NAMES)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, wherever its client library keeps it."""
    response = getattr(error, "response", None)
    places = (error, "status_code"), (response, "status_code"), (error, "status"), (error, "code")
    found = [getattr(where, name, None) for where, name in places]
    return next((value for value in found if isinstance(value, int) and 400 <= value < 600), None)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the server asked to wait, from a Retry-After header in either of its two forms."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    value = headers.get("Retry-After") if hasattr(headers, "get") else None
    return None if value is None else http_client.seconds(str(value))
