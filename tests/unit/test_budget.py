"""What may still be paid, whoever asks at the same time."""

from __future__ import annotations

import threading

import pytest

from onlinerl.budget import Account, Limits
from onlinerl.errors import BudgetError, OracleError
from onlinerl.types import Cost

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
