"""One call of an oracle: a deadline for every answer, another try for what may pass, and each answer handed on when it is there.

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
from dataclasses import dataclass
from functools import reduce
from itertools import count
from typing import Any, Literal

from onlinerl import http_client
from onlinerl.budget import Account, largest
from onlinerl.errors import OracleError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict

Answers = list[tuple[Query, Verdict | Failure]]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
SHOWN_FRAMES = 3

# Base classes of what the usual HTTP clients (httpx, requests, urllib, the clients of model vendors) raise when a connection fails.
_PASSING_NAMES = frozenset({"TransportError", "Timeout", "URLError", "APIConnectionError"})


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


def call(oracle: Oracle, queries: Sequence[Query]) -> Iterator[Answers]:
    """Every question with its result, in order, in lists of what has arrived since the last one.

    An exception, or no answer within `oracle.call_timeout_s`, costs the questions that were not answered yet. They are asked again, up
    to `oracle.retries` times, if the cause may pass: a missed deadline, a lost connection, HTTP 408, 425, 429 and 5xx (a Retry-After is
    kept to). After that each is a Failure.

    Raises:
        OracleError: as the oracle raised it: something is wrong that no other group would go better with.
    """
    waiting = deque(queries)
    for tries in count(1):
        trouble = yield from _attempt(oracle, waiting)
        if trouble is None:
            return
        if not trouble.may_pass or tries > oracle.retries:
            yield [(query, Failure(kind=trouble.kind, message=trouble.message)) for query in waiting]
            return
        pause = FIRST_PAUSE_S * 2 ** (tries - 1) if trouble.wait_s is None else trouble.wait_s
        time.sleep(min(pause, LONGEST_PAUSE_S))


class Caller:
    """Calls one oracle within an account. One that does not ask the account itself is paid for here, by whole groups.

    Args:
        oracle: that is called.
        account: what may be paid; None: anything.
    """

    def __init__(self, oracle: Oracle, account: Account | None = None) -> None:
        self.oracle, self.account = oracle, account or Account()
        self._asks_the_account = account is not None and not oracle.charge(account)
        self._largest: dict[int, Cost] = {}
        """What a group of so many responses has cost at most."""

    def call(self, queries: Sequence[Query], over: Callable[[], bool] = lambda: False) -> Iterator[Answers]:
        """As `call`. Nothing comes if it is `over` while others have yet to settle what they have reserved.

        Raises:
            BudgetError: if the next question may be too expensive.
            OracleError: as `call`.
        """
        if not self._asks_the_account:
            yield from call(self.oracle, queries)
            return
        most = reduce(Cost.plus, (self._most(len(query.responses)) for query in queries))
        if not self.account.wait(most, over):
            return
        paid = Cost()
        try:
            for answers in call(self.oracle, queries):
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
