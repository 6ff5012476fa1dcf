"""What may still be paid, whoever asks at the same time."""

from __future__ import annotations

import threading

import pytest

from onlinerl.budget import Account, Limits
from onlinerl.config import component
from onlinerl.controller.asking import Asker
from onlinerl.controller.feed import Feed
from onlinerl.errors import BudgetError, OracleError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Prompt, Query, Verdict

ONE = Cost(calls=1, tokens=10, tokens_out=4, usd=0.1)


@pytest.mark.parametrize(
    ("limits", "field"),
    [({"calls": 3}, "calls"), ({"tokens": 30}, "tokens"), ({"usd": 0.3}, "usd"), ({"usd": 0.3, "calls": 9}, "usd")],
)
def test_the_question_that_would_be_too_much_is_refused_and_no_other(limits, field):
    account = Account(Limits(**limits))
    for _ in range(3):
        assert account.reserve(ONE)
        account.settle(ONE, ONE)
    with pytest.raises(BudgetError, match=f"ledger.max_{field}: .*are spent") as error:
        account.reserve(ONE)
    assert isinstance(error.value, OracleError)
    assert account.spent == Cost(calls=3, tokens=30, tokens_out=12, usd=pytest.approx(0.3))


def test_what_others_have_reserved_is_waited_for_and_only_what_they_pay_counts():
    account = Account(Limits(calls=3))
    assert account.reserve(Cost(calls=2))
    assert not account.reserve(Cost(calls=2))
    account.settle(Cost(calls=2), Cost(calls=1))
    assert account.reserve(Cost(calls=2))


def test_what_was_spent_before_counts():
    account = Account(Limits(calls=3), Cost(calls=3))
    with pytest.raises(BudgetError):
        account.reserve(Cost(calls=1))


def test_without_limits_anything_goes():
    account = Account()
    assert account.reserve(Cost(calls=10**9, usd=1e9))


def test_eight_that_ask_at_once_pay_no_more_than_there_is():
    account, paid, refused = Account(Limits(calls=100)), list[int](), list[BudgetError]()

    def ask() -> None:
        try:
            while account.wait(Cost(calls=3), over=lambda: False):
                paid.append(2)
                account.settle(Cost(calls=3), Cost(calls=2))
        except BudgetError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(paid) == account.spent.calls == 98
    assert len(refused) == 8


def test_who_waits_stops_when_it_is_over():
    account = Account(Limits(calls=3))
    account.reserve(Cost(calls=3))
    assert not account.wait(Cost(calls=1), over=lambda: True)


class Charged(Oracle):
    """Says one thing for ten cents."""

    @property
    def version(self):
        return "charged"

    def judge(self, queries):
        scores = [tuple(map(float, range(len(query.responses)))) for query in queries]
        return [Verdict(annotator="charged", oracle_version="charged", scores=one, cost=ONE) for one in scores]


def test_oracles_inside_another_one_are_each_paid_for():
    one = {"name": f"{__name__}.Charged"}
    oracle = component(
        {"name": "composite", "members": {"a": one, "b": {"name": "swapped", "base": one}}}, "oracle", "oracles", Oracle
    )
    account, stop = Account(Limits(calls=7)), threading.Event()
    asker = Asker(oracle, None, account)
    query = Query(prompt=Prompt(id="p", text="", token_ids=()), responses=("x", "y"))
    ((_, label),) = next(asker.labels(Feed.of([query], stop), stop))
    assert account.spent == label.result.cost == Cost(calls=3, tokens=30, tokens_out=12, usd=pytest.approx(0.3))
    with pytest.raises(BudgetError):
        for _ in asker.labels(Feed.of([query, query], stop), stop):
            pass
    assert account.spent.calls == 7, "three for the first group, then one call after the other as long as there is enough"
