"""Labels are found by what was asked, in a run and in others; what the budget does not allow is not asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import PrivateAttr

from onlinerl import ledger_checks
from onlinerl.budget import Account, Limits
from onlinerl.config import LedgerConfig
from onlinerl.controller.asking import Asker
from onlinerl.controller.feed import Feed
from onlinerl.errors import BudgetError, ConfigError
from onlinerl.oracles.math_verifier import MathVerifier
from onlinerl.protocols.oracle import Oracle
from onlinerl.stores import labels
from onlinerl.stores.directory import RunDirectory
from onlinerl.types import Cost, Failure, Label, Message, Prompt, Query, Verdict, label_key


def query(name: str = "p", *responses: str, **more: Any) -> Query:
    return Query(prompt=Prompt(id=name, text="what", token_ids=(1,), **more), responses=responses or ("a", "b"))


def label(asked: Query, version: str = "1", **more: Any) -> Label:
    verdict = Verdict(annotator="a", oracle_version=version, scores=(1.0, 0.0), cost=Cost(calls=2, tokens=7, usd=0.5))
    return Label(**{"prompt_id": asked.prompt.id, "result": verdict, "key": label_key(asked, version), **more})


@pytest.fixture
def run_in(tmp_path) -> Iterator[Any]:
    opened: list[RunDirectory] = []

    def make(name: str) -> RunDirectory:
        manifest = {"name": name, "config_digest": name, "fingerprint": {}}
        opened.append(RunDirectory.create(tmp_path / "runs" / name, config_yaml="", manifest=manifest))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


@pytest.mark.parametrize(
    "other",
    [
        query("q"),
        query("p", "b", "a"),
        query("p", "a", "b", "c"),
        query(reference_answer="7"),
        query(source="s"),
        query(messages=(Message(role="user", content="x"),)),
    ],
)
def test_a_label_is_found_by_all_that_an_oracle_may_read(other):
    assert label_key(query(), "1") == label_key(query(), "1")
    assert label_key(other, "1") != label_key(query(), "1")
    assert label_key(query(), "2") != label_key(query(), "1")
    tokens = Query(prompt=replace(query().prompt, token_ids=(2, 3)), responses=("a", "b"))
    assert label_key(tokens, "1") == label_key(query(), "1"), "of the policy, which oracles do not see"


def test_what_is_known_costs_nothing_and_says_where_it_comes_from(run_in):
    run = run_in("one")
    known = label(query())
    run.labels(1, "verdicts").append([known])
    for ledger in (labels.Ledger(run), labels.Ledger(run)):
        found = ledger.find(known.key)
        assert found is not None
        assert (found.reused_from, found.saved) == ("one/iterations/0001/verdicts", known.result.cost)
        assert found.result == replace(known.result, cost=Cost())
    run.labels(2, "comparisons_0000").append([found])
    again = labels.Ledger(run).find(known.key)
    assert again is not None
    assert (again.reused_from, again.saved) == (found.reused_from, found.saved), "not what the second one has cost"
    assert labels.paid(run.path) == known.result.cost


def test_a_failure_is_not_known_and_has_its_cost(run_in):
    run = run_in("one")
    failed = label(query(), result=Failure(kind="error", message="x", cost=Cost(calls=3)))
    ledger = labels.Ledger(run)
    run.labels(1, "verdicts").append([failed])
    ledger.add(1, "verdicts", [failed])
    assert ledger.find(failed.key) is None
    assert labels.Ledger(run).find(failed.key) is None
    labels.record_trial(run, Cost(calls=2))
    labels.record_trial(run, Cost(calls=1, usd=0.25))
    assert labels.paid(run.path) == Cost(calls=6, usd=0.25)


def test_labels_of_other_runs_are_used_if_asked_for_also_those_that_come_later(run_in, tmp_path):
    one, other = run_in("one"), run_in("other")
    first, second, third = (label(query(name)) for name in "abc")
    other.labels(1, "verdicts").append([first])
    assert labels.Ledger(one).find(first.key) is None
    for source in (tmp_path / "runs", other.path):
        ledger = labels.Ledger(one, source)
        found = ledger.find(first.key)
        assert found is not None
        assert found.reused_from == "other/iterations/0001/verdicts"
    other.labels(1, "verdicts").append([second])
    assert ledger.find(second.key) is None
    ledger.look_again()
    assert ledger.find(second.key) is not None
    other.labels(1, "verdicts").append([third])
    other.labels(1, "verdicts").seal()
    ledger.look_again()
    assert all(ledger.find(one.key) for one in (first, second, third)), "the journal has become a part"


def test_a_damaged_run_of_others_is_left_out_and_named(run_in, tmp_path):
    one, other, third = run_in("one"), run_in("other"), run_in("third")
    for run in (other, third):
        run.labels(1, "verdicts").append([label(query(run.path.name))])
        run.labels(1, "verdicts").seal()
    part = next(other.path.glob("iterations/0001/verdicts.parquet/*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    ledger = labels.Ledger(one, tmp_path / "runs")
    assert ledger.find(label(query("other")).key) is None
    assert ledger.find(label(query("third")).key) is not None
    (problem,) = ledger.unreadable
    assert "other/iterations/0001" in problem


class Paid(Oracle):
    """Each group costs two calls and takes a while."""

    _asked: list[str] = PrivateAttr(default_factory=list)

    @property
    def version(self) -> str:
        return "1"

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        time.sleep(0.02)
        self._asked += [one.prompt.id for one in queries]
        cost = Cost(calls=2)
        return [Verdict(annotator="a", oracle_version="1", scores=(1.0, 0.0), cost=cost) for _ in queries]


def labelled(asker: Asker, count: int, found: list[Label]) -> None:
    stop = threading.Event()
    for arrived in asker.labels(Feed.of([query(f"p{n}") for n in range(count)], stop), stop):
        found += [label for _, label in arrived]


def test_only_what_is_not_known_is_asked(run_in):
    run = run_in("one")
    run.labels(1, "verdicts").append([label(query("p1")), label(query("p3"))])
    oracle, found = Paid(groups_per_call=4, preference_temperature=2.0), list[Label]()
    labelled(Asker(oracle, labels.Ledger(run)), 5, found)
    assert sorted(oracle._asked) == ["p0", "p2", "p4"]
    assert sorted(one.prompt_id for one in found) == [f"p{n}" for n in range(5)]
    assert {one.prompt_id for one in found if one.reused_from} == {"p1", "p3"}
    assert all(one.key == label_key(query(one.prompt_id), "1") for one in found)
    assert {one.result.temperature for one in found} == {2.0}, "that of the oracle as it is configured now"


def test_at_the_end_of_the_budget_nothing_that_was_paid_for_is_lost():
    for _ in range(5):
        oracle, found = Paid(max_concurrent=8), list[Label]()
        account = Account(Limits(calls=21))
        with pytest.raises(BudgetError):
            labelled(Asker(oracle, account=account), 100, found)
        assert account.spent.calls == sum(one.result.cost.calls for one in found) == 2 * len(oracle._asked)
        assert 14 <= account.spent.calls <= 28, "it cannot know what a group costs before the first ones are answered"
        more, seen = list[Label](), len(oracle._asked)
        with pytest.raises(BudgetError):
            labelled(Asker(oracle, account=account), 100, more)
        assert len(oracle._asked) - seen <= 8


def test_a_budget_in_what_an_oracle_does_not_count_is_refused(toy_config, tmp_path):
    from onlinerl.config import load

    config = load(toy_config(tmp_path, {"ledger.max_usd": 5}))
    with pytest.raises(ConfigError, match=r"ledger.max_usd: is set, and sentiment has no price"):
        ledger_checks.check_limits(config, MathVerifier(), Cost(calls=1, tokens=5))
    ledger_checks.check_limits(config, MathVerifier(), Cost(calls=1, usd=0.01))
    tokens = config.model_copy(update={"ledger": LedgerConfig(max_tokens=5)})
    with pytest.raises(ConfigError, match=r"ledger.max_tokens: "):
        ledger_checks.check_limits(tokens, MathVerifier(), Cost(calls=1))


def test_labels_from_nowhere_are_refused_and_those_of_the_first_run_are_not(toy_config, tmp_path):
    from onlinerl.config import load, settled

    nowhere = settled(load(toy_config(tmp_path, {"ledger.reuse_from": "nowhere"})))
    with pytest.raises(ConfigError, match=r"ledger.reuse_from: there is no directory"):
        ledger_checks.check_source(nowhere)
    runs = settled(load(toy_config(tmp_path, {"ledger.reuse_from": str(tmp_path / "runs")})))
    ledger_checks.check_source(runs)


def test_others_may_write_while_their_labels_are_looked_for(run_in, tmp_path):
    one, others = run_in("one"), [run_in(name) for name in "abc"]
    ledger, failed = labels.Ledger(one, tmp_path / "runs"), list[BaseException]()

    def write(run: RunDirectory) -> None:
        try:
            for t in (1, 2):
                for n in range(10):
                    run.labels(t, "verdicts").append([label(query(f"{run.path.name}{t}{n}"))])
                run.labels(t, "verdicts").seal()
        except BaseException as error:  # noqa: BLE001  (of a thread)
            failed.append(error)

    threads = [threading.Thread(target=write, args=(run,)) for run in others]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ledger.look_again()
        assert all(ledger.find(key) for key in [*ledger._places])
    ledger.look_again()
    assert not failed
    assert not ledger.unreadable
    assert len(ledger) == 60


def test_a_damaged_table_of_ones_own_is_left_to_whoever_needs_it(run_in):
    run = run_in("one")
    for t in (1, 2):
        run.labels(t, "verdicts").append([label(query(f"p{t}"))])
        run.labels(t, "verdicts").seal()
    part = next(run.path.glob("iterations/0001/verdicts.parquet/*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    ledger = labels.Ledger(run)
    assert ledger.find(label(query("p1")).key) is None
    assert ledger.find(label(query("p2")).key) is not None
    assert len(ledger.unreadable) == 1
    assert labels.paid(run.path).calls == 2
