"""How many questions of a judgement have failed is handed on by every oracle that asks others, and counted with the labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from people import answering

from onlinerl.config import component
from onlinerl.controller.tally import Lost, is_final
from onlinerl.oracles.human import Human
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Label, Prompt, Query, Replies, Verdict

OF_THREE = Replies(asked=3, failed={"timeout": 1})


class Lossy(Oracle):
    """Scores by length with one question for each response, of which the first got no reply in time; `!` fails altogether."""

    gone: str = "timeout"

    @property
    def version(self):
        return f"lossy-{self.gone}"

    def judge(self, queries):
        return [self.one(query.responses) for query in queries]

    def one(self, responses):
        cost, k = Cost(calls=len(responses)), len(responses)
        if "!" in responses:
            return Failure(kind="timeout", message="late", cost=cost, replies=Replies(asked=k, failed={self.gone: k}))
        replies = Replies(asked=k, failed={self.gone: 1})
        return Verdict(
            annotator="lossy",
            oracle_version=self.version,
            scores=tuple(map(float, map(len, responses))),
            cost=cost,
            replies=replies,
        )


LOSSY, OTHER = ({"name": f"{__name__}.Lossy", **more} for more in ({}, {"gone": "refused"}))
BOTH = Replies(asked=6, failed={"timeout": 1, "refused": 1})


def built(name: str, **knobs: object) -> Oracle:
    return component({"name": name, **knobs}, "oracle", "oracles", Oracle)


def query(*responses: str) -> Query:
    return Query(prompt=Prompt(id="p", text="what ", token_ids=(1,)), responses=responses, iteration=1)


def anchors(folder: Path) -> str:
    lines = [json.dumps({"prompt": "which", "chosen": "x" * (n % 5 + 1), "rejected": "y" * (n % 3 + 1)}) for n in range(60)]
    (folder / "anchors.jsonl").write_text("\n".join(lines))
    return str(folder / "anchors.jsonl")


@pytest.mark.parametrize(
    ("name", "knobs", "handed_on"),
    [
        ("swapped", {"base": LOSSY}, Replies(asked=6, failed={"timeout": 2})),
        ("noisy", {"base": LOSSY, "flip_rate": 0.5}, OF_THREE),
        ("noisy", {"base": LOSSY, "score_noise": 0.5}, OF_THREE),
        ("calibrated", {"base": LOSSY}, OF_THREE),
        ("ensemble", {"members": {"a": LOSSY, "b": OTHER}}, BOTH),
        ("ensemble", {"members": {"a": LOSSY, "b": OTHER}, "combine": "vote"}, BOTH),
        ("composite", {"members": {"a": LOSSY, "b": OTHER}}, BOTH),
        ("composite", {"members": {"a": LOSSY, "b": OTHER}, "combine": "vote"}, BOTH),
        ("router", {"cheap": LOSSY, "expensive": OTHER, "expensive_below": 1.0}, BOTH),
        ("router", {"cheap": LOSSY, "expensive": OTHER, "expensive_below": 0.0, "audit": 0.0}, OF_THREE),
        ("human", {"ai": LOSSY}, OF_THREE),
    ],
)
def test_every_oracle_that_asks_others_says_how_many_replies_they_have_lost(tmp_path, name, knobs, handed_on):
    if name == "calibrated":
        knobs = {**knobs, "data": anchors(tmp_path)}
    oracle = built(name, **knobs)
    oracle.remember(tmp_path / "oracle")
    oracle.open()
    verdict, failure = oracle.ask([query("a", "bb", "ccc"), query("a", "!", "ccc")])
    oracle.close()
    assert isinstance(verdict, Verdict)
    assert verdict.replies == handed_on
    assert isinstance(failure, Failure)
    assert failure.replies.lost > handed_on.lost, "of the member that failed, and of those that were asked with it"


def test_what_was_asked_of_another_oracle_before_people_is_paid_too(tmp_path):
    with answering(tmp_path, lambda question: "left"):
        oracle = built("human", ai=LOSSY, choose="unsure", unsure_below=1.0, max_wait_s=60, undo_s=0.0)
        assert isinstance(oracle, Human)
        oracle.remember(tmp_path)
        oracle.open()
        (verdict,) = oracle.ask([query("a", "bb", "ccc")])
        oracle.close()
    assert verdict.annotator == "human:ann"
    assert verdict.cost.calls == 3 + 1
    assert verdict.replies == Replies(), "the verdict is of people, and nothing of it is missing"


def test_a_model_that_is_trained_further_hands_on_what_it_was_told(tmp_path):
    """Its own verdicts have no questions; that is what `base` said, unchanged."""
    from onlinerl.oracles.refreshed import Refreshed

    base = built(**LOSSY)
    oracle = Refreshed.model_construct(base=base, labels=base)
    (verdict,) = oracle.judge([query("a", "bb", "ccc")])
    assert verdict.replies == OF_THREE


def test_what_can_still_become_better_is_not_final():
    verdict = Verdict(annotator="a", oracle_version="1", scores=(0.0, 1.0))
    partly = replace(verdict, replies=OF_THREE)
    assert is_final(Label(prompt_id="p", result=verdict))
    assert not is_final(Label(prompt_id="p", result=partly))
    assert is_final(Label(prompt_id="p", result=partly, reused_from="another")), "it is not this run's to repair"
    assert not is_final(Label(prompt_id="p", result=Failure(kind="error", message="")))


def test_how_many_are_to_be_expected_follows_from_those_that_are_there():
    lost = Lost()
    assert lost.expected(10) == 0
    lost.add(Label(prompt_id="p", result=Verdict(annotator="a", oracle_version="1", scores=(0.0,))))
    assert lost.expected(10) == 0, "a group that is one question"
    lost.add(Label(prompt_id="p", result=Verdict(annotator="a", oracle_version="1", scores=(0.0,), replies=OF_THREE)))
    assert lost.expected(10) == 30
