"""What happens to a question whose answer is late, never comes, or is an exception."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from pydantic import Field, PrivateAttr

from onlinerl import oracle_calls
from onlinerl.controller import asking
from onlinerl.controller.feed import Feed, Stopped
from onlinerl.errors import OracleError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Failure, Prompt, Query, Verdict


class Paid(Oracle):
    """Writes down what it was asked, one entry per payment, and goes through `script`: an exception or an answer each."""

    script: list = Field(default_factory=list)
    _payments: list = PrivateAttr(default_factory=list)

    @property
    def version(self) -> str:
        return "1"

    def judge(self, queries: Sequence[Query]) -> Iterable[Verdict | Failure]:
        return [self._one(query) for query in queries]

    def _one(self, query: Query) -> Verdict:
        self._payments.append(query.prompt.id)
        turn = self.script[len(self._payments) - 1] if len(self._payments) <= len(self.script) else None
        if isinstance(turn, BaseException):
            raise turn
        if isinstance(turn, threading.Event):
            turn.wait(30)
        return Verdict(annotator="paid", oracle_version="1", scores=(float(len(query.responses[0])),))


class Streamed(Paid):
    """The same, each answer as soon as it is known."""

    def judge(self, queries: Sequence[Query]) -> Iterator[Verdict | Failure]:
        return (self._one(query) for query in queries)


def queries(count: int) -> list[Query]:
    return [Query(prompt=Prompt(id=f"p{i}", text="x", token_ids=(1,)), responses=("a" * i,)) for i in range(count)]


def ask(oracle: Oracle, count: int) -> list[Verdict | Failure]:
    asked = queries(count)
    pairs = [pair for arrived in asking.answers(oracle, asked) for pair in arrived]
    assert [query for query, _ in pairs] == asked, "every query once, in order"
    return [result for _, result in pairs]


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, in seconds; none of them is waited for."""
    made: list[float] = []
    monkeypatch.setattr(oracle_calls.time, "sleep", made.append)
    return made


def status(code: int, **headers: str) -> Exception:
    """As the clients of model vendors raise it."""
    error = RuntimeError(f"HTTP {code}")
    error.response = SimpleNamespace(status_code=code, headers={k.replace("_", "-"): v for k, v in headers.items()})
    return error


@pytest.mark.parametrize("passing", [TimeoutError("late"), ConnectionResetError(), status(429), status(503), status(408)])
def test_what_may_pass_is_asked_again_after_growing_pauses(pauses, passing):
    oracle = Paid(script=[None, passing, passing])
    assert all(isinstance(result, Verdict) for result in ask(oracle, 3))
    assert oracle._payments == ["p0", "p1", "p1", "p1", "p2"]
    assert pauses == [1.0, 2.0]


def test_retries_are_bounded_and_the_others_go_on(pauses):
    oracle = Paid(script=[status(503)] * 4, retries=3)
    failure, *rest = ask(oracle, 3)
    assert (failure.kind, len(pauses)) == ("error", 3)
    assert "HTTP 503" in failure.message
    assert all(isinstance(result, Verdict) for result in rest)


@pytest.mark.parametrize("lasting", [KeyError("choices"), status(401), SystemExit(3)])
def test_what_cannot_pass_is_a_failure_at_once(pauses, lasting):
    """A bug in one case costs one group, not the run and not what was paid for already."""
    oracle = Paid(script=[None, lasting])
    first, failure, last = ask(oracle, 3)
    assert isinstance(first, Verdict)
    assert isinstance(last, Verdict)
    assert failure.kind == "error"
    assert "Paid raised" in failure.message
    assert "test_asking.py" in failure.message, "where it happened"
    assert pauses == []


@pytest.mark.parametrize(
    ("said", "waited"),
    [({"Retry_After": "7"}, 7.0), ({"Retry_After": "100000"}, 60.0), ({"Retry_After": "soon"}, 1.0), ({}, 1.0)],
)
def test_a_server_that_says_when_is_taken_at_its_word(pauses, said, waited):
    ask(Paid(script=[status(429, **said)]), 1)
    assert pauses == [waited]


def test_retry_after_may_be_a_date(pauses):
    ask(Paid(script=[status(429, Retry_After=formatdate(oracle_calls.time.time() + 20, usegmt=True))]), 1)
    assert 15 < pauses[0] <= 20


def test_an_answer_that_never_comes_costs_its_group_only(pauses):
    stuck = threading.Event()
    oracle = Paid(script=[None, stuck, stuck], retries=1, call_timeout_s=0.2)
    try:
        first, failure, last = ask(oracle, 3)
    finally:
        stuck.set()
    assert isinstance(first, Verdict)
    assert isinstance(last, Verdict)
    assert failure.kind == "timeout"
    assert "no answer within 0.2 s" in failure.message


def test_what_a_stream_has_given_is_kept(pauses):
    """Ten groups in one call, the connection lost after the seventh: seven answers are handed on before the error is dealt with."""
    oracle = Streamed(script=[None] * 7 + [ConnectionResetError()], groups_per_call=10)
    assert all(isinstance(result, Verdict) for result in ask(oracle, 10))
    assert oracle._payments == [f"p{i}" for i in (0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9)]


def test_a_call_gets_as_many_groups_as_the_oracle_wants():
    sizes: list[int] = []

    class Sized(Paid):
        def judge(self, queries):
            sizes.append(len(queries))
            return super().judge(queries)

    assert len(ask(Sized(groups_per_call=4), 10)) == 10
    assert sizes == [4, 4, 2]


def test_what_no_group_would_go_better_with_stops(pauses):
    with pytest.raises(OracleError, match="no reference answer"):
        ask(Paid(script=[OracleError("no reference answer")]), 2)
    assert pauses == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_answers_stops(count):
    class Miscounting(Paid):
        def judge(self, queries):
            answers = list(super().judge(queries))
            return iter((answers * 2)[:count]) if self.groups_per_call == 2 else (answers * 3)[:count]

    for groups_per_call in (2, 5):
        with pytest.raises(OracleError, match=f"returned {count} results for 2 queries"):
            ask(Miscounting(groups_per_call=groups_per_call), 2)


# --- several calls at once ---


class Busy(Oracle):
    """Counts the calls that are under way, and lets none end before as many are as it allows."""

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _gate: threading.Barrier = PrivateAttr()
    _now: int = PrivateAttr(0)
    _most: int = PrivateAttr(0)

    def model_post_init(self, context: object) -> None:
        self._gate = threading.Barrier(self.max_concurrent)

    @property
    def version(self) -> str:
        return "1"

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        with self._lock:
            self._now += 1
            self._most = max(self._most, self._now)
        self._gate.wait(timeout=30)
        with self._lock:
            self._now -= 1
        return [Verdict(annotator="busy", oracle_version="1", scores=(1.0,)) for _ in queries]


def test_as_many_calls_at_once_as_the_oracle_allows():
    oracle = Busy(max_concurrent=4, groups_per_call=2, call_timeout_s=60, retries=0)
    results = {query.prompt.id: result for arrived in asking.answers(oracle, queries(16)) for query, result in arrived}
    assert len(results) == 16
    assert all(isinstance(result, Verdict) for result in results.values()), "a barrier broke: fewer calls than allowed"
    assert oracle._most == 4


def test_the_limit_holds_for_all_phases_together():
    oracle = Busy(max_concurrent=2, call_timeout_s=60, retries=0)
    asker, stop = asking.Asker(oracle), threading.Event()
    found: list[int] = []

    def phase():
        found.extend(len(arrived) for arrived in asker.answers(Feed.of(queries(8), stop), stop))

    threads = [threading.Thread(target=phase) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(found) == 16
    assert oracle._most == 2


def test_a_call_goes_on_only_after_its_answers_were_taken_care_of():
    oracle = Paid(script=[])
    arriving = asking.answers(oracle, queries(4))
    next(arriving)
    time.sleep(0.3)  # time enough for a call that does not wait
    assert oracle._payments == ["p0"]
    assert len(list(arriving)) == 3


def test_questions_that_come_one_by_one_are_asked_as_they_come():
    oracle, stop = Paid(script=[]), threading.Event()
    feed: Feed[Query] = Feed(stop)
    arriving = asking.Asker(oracle).answers(feed, stop)
    for query in queries(3):
        feed.put([query])
        assert [asked.prompt.id for asked, _ in next(arriving)] == [query.prompt.id]
    feed.close()
    assert list(arriving) == []


def test_a_run_that_is_stopped_asks_nothing_more():
    oracle, stop = Paid(script=[]), threading.Event()
    arriving = asking.Asker(oracle).answers(Feed.of(queries(4), stop), stop)
    next(arriving)
    stop.set()
    with pytest.raises(Stopped):
        list(arriving)
    assert oracle._payments == ["p0"]
