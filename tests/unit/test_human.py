"""The oracle that asks people: what becomes a label, who judges what they do not, and what it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from people import answering, longer, said, until

from onlinerl.budget import Account, Limits
from onlinerl.config import component
from onlinerl.controller.asking import answers as asked_for
from onlinerl.errors import BudgetError, ConfigError, OracleError
from onlinerl.metrics.catalogue import CATALOGUE
from onlinerl.oracles.human import Human
from onlinerl.people.agreement import gold_accuracy
from onlinerl.people.export import rows
from onlinerl.people.queue import QUESTIONS, Queue
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Failure, Prompt, Query, Verdict

AI = {"name": "python", "function": f"{__name__}.by_length"}
CALLS: list[int] = []


def by_length(groups: list[dict]) -> list[list[float]]:
    """For the oracle that people stand beside: twice the length."""
    CALLS.append(len(groups))
    return [[2.0 * len(response) for response in group["responses"]] for group in groups]


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def human(folder: Path | None, **knobs: Any) -> Human:
    built: Human = component({"name": "human", "undo_s": 0.0, **knobs}, "oracle", "oracles", Oracle)
    if folder is not None:
        built.remember(folder)
    built.open()
    return built


def query(number: int, *responses: str, iteration: int | None = 1, heldout: bool = False) -> Query:
    texts = responses or (f"{number} a", f"{number} longer")
    prompt = Prompt(id=f"p{number}", text=f"prompt {number}", token_ids=(1,))
    return Query(prompt=prompt, responses=texts, iteration=iteration, heldout=heldout)


def judged(oracle: Oracle, queries: Sequence[Query]) -> list[Verdict | Failure]:
    """As the controller asks."""
    return [result for some in asked_for(oracle, queries) for _, result in some]


def by(verdict: Verdict | Failure) -> str:
    assert isinstance(verdict, Verdict)
    return str(json.loads((verdict.raw or "").splitlines()[0])["by"])


# --- what people say becomes labels ---


def test_a_run_waits_and_gets_exactly_what_people_have_said(tmp_path):
    oracle = human(tmp_path, max_wait_s=60)
    choices = {"prompt 0": "left", "prompt 1": "right", "prompt 2": "tie", "prompt 3": "both_bad", "prompt 4": "skip"}
    with answering(tmp_path, lambda question: choices[question.prompt]) as answered:  # type: ignore[arg-type,return-value]
        results = judged(oracle, [query(n) for n in range(5)])
    shown = {question.prompt: question for question in answered}
    for n, result in enumerate(results):
        assert isinstance(result, Verdict)
        one, other = query(n).responses
        left = shown[f"prompt {n}"].left == one
        expected = {"left": 0.95, "right": 0.05, "tie": 0.5, "both_bad": 0.5, "skip": np.nan}[choices[f"prompt {n}"]]
        np.testing.assert_allclose(result.matrix()[0, 1], expected if left else 1 - expected)
        assert (result.scores, result.annotator, result.cost.calls) == (None, "human:ann", 1)
        assert other in (shown[f"prompt {n}"].left, shown[f"prompt {n}"].right)
    assert not results[4].judged().any(), "a skip is no tie, and no failure"  # type: ignore[union-attr]


def test_the_response_that_was_on_the_left_is_recorded_as_shown_first(tmp_path):
    oracle = human(tmp_path, max_wait_s=60)
    with answering(tmp_path, lambda question: "left") as answered:
        results = judged(oracle, [query(n) for n in range(20)])
    cells = np.array([result.preferences for result in results])  # type: ignore[union-attr]
    assert (np.isnan(cells).sum(axis=(1, 2)) == 3).all(), "one order of one pair, and it is the one that was shown"
    assert {float(cell) for cell in cells[~np.isnan(cells)]} == {0.95}
    firsts = sum(question.left == query(int(question.prompt.split()[1])).responses[0] for question in answered)
    assert 3 < firsts < 17, "neither response has a side of its own"


def test_sides_follow_from_the_seed_and_not_from_the_order_of_the_responses(tmp_path):
    shown = []
    for name, seed, reverse in (("a", 0, False), ("b", 0, True), ("c", 1, False)):
        oracle = human(tmp_path / name, max_wait_s=60, seed=seed)
        queries = [query(n) for n in range(20)]
        with answering(tmp_path / name) as answered:
            judged(oracle, [replace(q, responses=q.responses[::-1]) for q in queries] if reverse else queries)
        shown.append(sorted((question.prompt, question.left) for question in answered))
    assert shown[0] == shown[1] != shown[2]


def test_strengths_become_probabilities(tmp_path):
    oracle = human(tmp_path, max_wait_s=60, answers="strength", prob_clear=0.9, prob_slight=0.6)
    thread = threading.Thread(target=lambda: results.extend(judged(oracle, [query(0), query(1)])), daemon=True)
    results: list[Any] = []
    thread.start()
    queue = Queue(tmp_path)
    until(lambda: (queue.look(), len(queue.questions()) == 2)[1], "two questions")
    for question, strength in zip(queue.questions(), ("clear", "slight"), strict=True):
        assert question.strength
        queue.answer(said(question, "left", strength=strength))
    thread.join(60)
    for result, question, prob, strength in zip(results, queue.questions(), (0.9, 0.6), (2.0, 1.0), strict=True):
        i, j = (0, 1) if question.left == query(int(question.prompt.split()[1])).responses[0] else (1, 0)
        assert (result.preferences[i][j], result.strength[i][j]) == (prob, strength)


def test_the_mean_of_several_people_counts(tmp_path):
    oracle = human(tmp_path, max_wait_s=60, n_annotators=3)
    with answering(tmp_path, annotators=("ann", "bob", "cat")):
        (result,) = judged(oracle, [query(0)])
    assert (result.annotator, result.cost.calls) == ("human:ann+bob+cat", 3)  # type: ignore[union-attr]
    assert result.matrix()[1, 0] == pytest.approx(0.95)  # type: ignore[union-attr]
    figures = {figure.name: figure for figure in oracle.figures() if figure.labels is None}
    assert (figures["people_agreement"].value, figures["people_agreement"].n) == (1.0, 3)


def test_its_figures_are_metrics_of_the_catalogue(tmp_path):
    oracle = human(tmp_path, ai=AI, n_annotators=2)
    judged(oracle, [query(n) for n in range(4)])
    queue = Queue(tmp_path)
    queue.look()
    for number, question in enumerate(queue.questions()[:3]):
        queue.answer(said(question, "left" if number else "right"))
        queue.answer(said(question, "left" if number == 1 else "right", "bob"))
    records = [CATALOGUE.record(one.name, one.value, n=one.n, labels=one.labels) for one in oracle.figures()]
    assert not any(map(CATALOGUE.problem, records))
    found = {(one.name, *one.labels.values()): round(one.value, 3) for one in records}
    assert found == {
        ("people_questions", "open"): 1,
        ("people_questions", "answered"): 3,
        ("people_agreement",): 0.667,
        ("people_kappa",): 0.4,
    }


# --- questions whose answer is known ---


def known_pairs(folder: Path, count: int, **more: Any) -> str:
    rows = [{"prompt": f"known {n}", "chosen": f"{n} good", "rejected": f"{n} bad and longer", **more} for n in range(count)]
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "known.jsonl")


def test_who_does_not_read_is_found_out(tmp_path):
    oracle = human(tmp_path / "queue", max_wait_s=60, n_annotators=2, gold=known_pairs(tmp_path, 8), gold_share=1.0)

    def work(annotator: str) -> None:
        queue = Queue(tmp_path / "queue")
        while not over.wait(0.01):
            queue.look()
            for question in queue.open():
                read = "left" if "good" in question.left else "right"
                queue.answer(said(question, read if annotator == "reads" else "left", annotator))

    over = threading.Event()
    threads = [threading.Thread(target=work, args=(who,), daemon=True) for who in ("reads", "guesses")]
    for thread in threads:
        thread.start()
    results = judged(oracle, [query(n) for n in range(20)])
    queue = Queue(tmp_path / "queue")
    until(lambda: (queue.look(), not queue.open())[1], "everything answered")
    over.set()
    for thread in threads:
        thread.join(60)
    assert all(isinstance(result, Verdict) for result in results)
    assert len(queue.gold()) == 8, "each pair once"
    assert len(queue.questions()) == 20
    right = gold_accuracy(queue)
    on_the_left = sum(one.gold == "left" for one in queue.gold())
    assert (right["reads"].share, right["reads"].answers) == (1.0, 8)
    assert right["guesses"].share == on_the_left / 8 < 1
    figure = next(one for one in oracle.figures() if one.name == "people_gold_accuracy")
    assert (figure.value, figure.n) == (pytest.approx((8 + on_the_left) / 16), 16)
    assert not CATALOGUE.problem(CATALOGUE.record(figure.name, figure.value, n=figure.n))
    for one in queue.gold():
        assert "good" in getattr(one, one.gold or "")


def test_known_answers_are_labels_of_nothing(tmp_path):
    account = Account(Limits(calls=40))
    oracle = human(tmp_path / "queue", max_wait_s=60, gold=known_pairs(tmp_path, 40), gold_share=1.0)
    oracle.charge(account)
    with answering(tmp_path / "queue"):
        results = judged(oracle, [query(n) for n in range(40)])
        queue = Queue(tmp_path / "queue")
        until(lambda: (queue.look(), not queue.open())[1], "everything answered")
    assert sum(result.cost.calls for result in results) == 40
    assert len(queue.gold()) == 40
    assert queue.put_in(1) == {one.id for one in queue.questions()}
    assert len(rows(queue)) == 40
    plain = human(None, max_wait_s=60)
    assert oracle.version == plain.version, "what people are checked with is no part of what they say"


def test_a_run_does_not_wait_for_answers_that_are_known(tmp_path):
    oracle = human(tmp_path / "queue", max_wait_s=60, gold=known_pairs(tmp_path, 3), gold_share=1.0)
    queue = Queue(tmp_path / "queue")

    def no_gold(question: Any) -> Any:
        return "left" if question.prompt.startswith("prompt") else "skip"

    with answering(tmp_path / "queue", no_gold):
        results = judged(oracle, [query(n) for n in range(3)])
    assert all(isinstance(result, Verdict) for result in results)
    queue.look()
    assert gold_accuracy(queue) == {}, "a skip says nothing"
    assert not [one for one in oracle.figures() if one.name == "people_gold_accuracy"]


def test_a_known_answer_is_asked_for_in_its_iteration_only_and_one_in_fifty_by_default(tmp_path):
    oracle = human(tmp_path / "queue", ai=AI, gold=known_pairs(tmp_path, 400, p=0.9))
    judged(oracle, [query(n) for n in range(400)])
    queue = Queue(tmp_path / "queue")
    queue.look()
    asked = queue.gold()
    assert 2 <= len(asked) <= 20
    assert {one.id for one in asked} < {one.id for one in queue.open()}
    judged(oracle, [query(1000, iteration=2)])
    queue.look()
    assert not {one.id for one in asked} & {one.id for one in queue.open()}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "holds no pairs: FileNotFoundError"),
        ("{}\n", "holds no pairs: KeyError 'prompt'"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b", "p": 0.5}\n', "names no better response"),
    ],
)
def test_a_file_of_known_pairs_that_is_none_is_refused(tmp_path, content, cause):
    path = tmp_path / "known.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OracleError, match=cause) as caught:
        human(None, ai=AI, gold=str(path))
    assert caught.value.field == "oracle.gold"


def test_a_share_of_known_pairs_needs_some():
    with pytest.raises(ConfigError, match="is read with gold only"):
        human(None, ai=AI, gold_share=0.1)


def test_a_share_of_the_comparisons_is_for_several(tmp_path):
    oracle = human(tmp_path, ai=AI, n_annotators=2, overlap=0.3)
    judged(oracle, [query(n) for n in range(100)])
    queue = Queue(tmp_path)
    queue.look()
    needed = [question.needed for question in queue.questions()]
    assert set(needed) == {1, 2}
    assert 15 < needed.count(2) < 45


def test_some_pairs_of_a_group_are_asked_and_the_others_are_not_judged(tmp_path):
    responses = ("a", "bb", "ccc", "a")
    oracle = human(tmp_path, max_wait_s=60, pairs_per_group=2)
    with answering(tmp_path) as answered:
        (result,) = judged(oracle, [query(0, *responses)])
    assert isinstance(result, Verdict)
    assert len(answered) == 2
    matrix = result.matrix()
    assert (matrix[0, 3], np.isnan(matrix[:3, :3]).sum()) == (0.5, 2), "equal texts are equal, and one pair was not asked about"
    with answering(tmp_path / "all") as answered:
        (result,) = judged(human(tmp_path / "all", max_wait_s=60, pairs_per_group=99), [query(0, *responses)])
    assert len(answered) == 3
    assert not np.isnan(result.matrix()).any()  # type: ignore[union-attr]


def test_equal_responses_ask_nobody(tmp_path):
    (result,) = judged(human(tmp_path, max_wait_s=60), [query(0, "a", "a")])
    assert result.matrix()[0, 1] == 0.5  # type: ignore[union-attr]
    assert not (tmp_path / QUESTIONS).exists()


# --- when they do not answer ---


def test_it_goes_on_at_once_with_the_other_oracle_and_finds_later_what_people_have_said(tmp_path):
    oracle = human(tmp_path, ai=AI)
    first = judged(oracle, [query(n) for n in range(3)])
    assert [by(one) for one in first] == ["ai"] * 3
    assert first[0].matrix()[1, 0] > 0.99  # type: ignore[union-attr]
    queue = Queue(tmp_path)
    queue.look()
    assert [queue.status(question.id) for question in queue.questions()] == ["late"] * 3
    assert queue.answer(said(queue.questions()[1], "left")) == "saved"
    assert [by(one) for one in judged(oracle, [query(n) for n in range(3)])] == ["ai", "people", "ai"]
    assert [answer.late for answer in queue.answers(queue.questions()[1].id)] == [True]


def test_when_the_time_is_over_the_other_oracle_judges_only_what_nobody_has(tmp_path):
    oracle = human(tmp_path, ai=AI, max_wait_s=1.0, groups_per_call=8)
    with answering(tmp_path, lambda question: "left") as answered:
        until(lambda: not answered, "")
        queries = [query(n) for n in range(4)]
        assert [by(one) for one in judged(oracle, queries)] == ["people"] * 4
    queue = Queue(tmp_path)
    queue.look()
    silent = [query(n) for n in range(10, 13)]
    done = threading.Event()

    def one_answer() -> None:
        until(lambda: (queue.look(), len(queue.questions()) == 7)[1], "the questions")
        queue.answer(said(queue.questions()[-1], "left"))
        done.set()

    threading.Thread(target=one_answer, daemon=True).start()
    assert [by(one) for one in judged(oracle, silent)] == ["ai", "ai", "people"]
    assert done.is_set()
    assert sum(CALLS) == 2, "what people have said is not paid for"


def test_without_another_oracle_the_group_has_failed_and_is_asked_about_again(tmp_path):
    oracle = human(tmp_path, max_wait_s=0.2)
    first, second = judged(oracle, [query(0), query(1)])
    assert isinstance(first, Failure)
    assert (first.kind, "the question stays open" in first.message) == ("timeout", True)
    assert isinstance(second, Failure)
    with answering(tmp_path):
        again = human(tmp_path, max_wait_s=60)
        assert [by(one) for one in judged(again, [query(0), query(1)])] == ["people", "people"]
    assert (tmp_path / QUESTIONS).read_text().count('"question"') == 2, "they were put once"


def test_what_all_have_skipped_is_for_the_other_oracle(tmp_path):
    with answering(tmp_path, lambda question: "skip"):
        (result,) = judged(human(tmp_path, ai=AI, max_wait_s=60), [query(0)])
    assert by(result) == "ai"


def test_an_answer_that_was_taken_back_in_time_is_not_a_label(tmp_path):
    oracle = human(tmp_path, max_wait_s=60, undo_s=1.0)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(judged(oracle, [query(0)])), daemon=True)
    thread.start()
    queue = Queue(tmp_path)
    until(lambda: (queue.look(), queue.questions())[1], "a question")
    (question,) = queue.questions()
    wrong = said(question, "left")
    queue.answer(wrong)
    assert queue.undo("ann", wrong.submission) == "undone"
    right = said(question, "right")
    queue.answer(right)
    thread.join(60)
    assert json.loads(results[0].raw)["answers"][0]["choice"] == "right"


def test_closing_ends_the_wait(tmp_path):
    oracle = human(tmp_path, max_wait_s=600)
    threading.Timer(0.3, oracle.close).start()
    with pytest.raises(OracleError, match="was closed"):
        judged(oracle, [query(0)])


# --- whom it asks ---


def test_trials_and_held_out_answers_go_to_nobody_unless_they_are_to(tmp_path):
    alone = human(tmp_path / "a", max_wait_s=60)
    for one in (query(0, iteration=None), query(0, heldout=True)):
        (result,) = judged(alone, [one])
        assert by(result) == "nobody"
        assert not result.judged().any()  # type: ignore[union-attr]
    assert any("no win rates" in remark for remark in alone.remarks)
    beside = human(tmp_path / "b", ai=AI, max_wait_s=60)
    assert [by(one) for one in judged(beside, [query(0, iteration=None), query(0, heldout=True)])] == ["ai", "ai"]
    with answering(tmp_path / "c"):
        asked = human(tmp_path / "c", ai=AI, max_wait_s=60, heldout="people", choose="random", share=0.01)
        assert [by(one) for one in judged(asked, [query(0, heldout=True)])] == ["people"]
    (result,) = judged(human(tmp_path / "d", ai=AI, heldout="nobody"), [query(0, heldout=True)])
    assert by(result) == "nobody"


def test_no_more_than_the_budget_of_an_iteration_is_asked_over_kills_and_threads(tmp_path):
    knobs = {"ai": AI, "per_iteration": 5, "groups_per_call": 1, "max_concurrent": 8}
    judged(human(tmp_path, **knobs), [query(n) for n in range(20)])
    judged(human(tmp_path, **knobs), [query(n) for n in range(40)])
    judged(human(tmp_path, **knobs), [query(n, iteration=2) for n in range(50, 60)])
    queue = Queue(tmp_path)
    queue.look()
    assert [question.iteration for question in queue.questions()] == [1] * 5 + [2] * 5


def test_a_share_is_drawn_by_prompt_and_texts(tmp_path):
    drawn = []
    for name in ("a", "b"):
        judged(human(tmp_path / name, ai=AI, choose="random", share=0.25), [query(n) for n in range(100)])
        queue = Queue(tmp_path / name)
        queue.look()
        drawn.append({question.id for question in queue.questions()})
    assert drawn[0] == drawn[1]
    assert 10 < len(drawn[0]) < 40


def test_people_are_asked_where_the_other_is_not_sure(tmp_path):
    even, clear = query(0, "aa", "bb"), query(1, "a", "b" * 20)
    with answering(tmp_path, lambda question: "left") as answered:
        oracle = human(tmp_path, ai=AI, max_wait_s=60, choose="unsure", unsure_below=0.5)
        assert [by(one) for one in judged(oracle, [even, clear])] == ["people", "ai"]
    assert [question.prompt for question in answered] == ["prompt 0"]


def test_answers_are_calls_of_the_budget(tmp_path):
    oracle, account = human(tmp_path, max_wait_s=60), Account(Limits(calls=3))
    assert oracle.charge(account)
    with answering(tmp_path) as answered:
        assert len([*oracle.judge([query(0), query(1)])]) == 2
        assert account.spent.calls == 2
        with pytest.raises(BudgetError, match="2 calls of 3 calls are spent"):
            list(oracle.judge([query(2), query(3)]))
        until(lambda: len(answered) == 3, "the one that could be paid for is answered")
        assert [by(one) for one in oracle.judge([query(2)])] == ["people"], "and it is not lost"
    assert len(answered) == 3


# --- what it says and refuses ---


def test_what_people_and_the_other_oracle_are_asked_is_an_upper_bound():
    judge = {"name": "judge_pair", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    both: Human = component(
        {"name": "human", "ai": judge, "pairs_per_group": 3, "n_annotators": 2}, "oracle", "oracles", Oracle
    )
    assert both.asks_as_needed
    assert [both.requests(k) for k in (1, 2, 4)] == [0, 2 + 2, 12 + 6]
    alone = human(None, max_wait_s=60)
    assert (alone.asks_as_needed, alone.requests(4)) == (False, None)


def test_it_says_how_many_comparisons_people_are_asked_for():
    assert human(None, max_wait_s=60).people(8, 4) == 8
    assert human(None, max_wait_s=60, pairs_per_group=9).people(8, 4) == 48
    assert human(None, ai=AI, per_iteration=5).people(8, 4) == 5
    assert human(None, ai=AI).people(30, 2, heldout=True) == 0
    assert human(None, ai=AI, heldout="people").people(30, 2, heldout=True) == 30
    assert (
        component(
            {"name": "router", "cheap": AI, "expensive": {"name": "human", "ai": AI}}, "oracle", "oracles", Oracle
        ).people(8, 4)
        == 8
    )


@pytest.mark.parametrize(
    ("knobs", "field", "fix"),
    [
        ({}, "oracle.max_wait_s", "oracle.ai="),
        ({"max_wait_s": 0.0}, "oracle.max_wait_s", "oracle.ai="),
        ({"max_wait_s": 60, "per_iteration": 5}, "oracle.per_iteration", "oracle.ai="),
        ({"max_wait_s": 60, "heldout": "ai"}, "oracle.heldout", "oracle.ai="),
        ({"max_wait_s": 60, "choose": "random", "share": 0.5}, "oracle.choose", "oracle.ai="),
        ({"ai": AI, "choose": "random"}, "oracle.share", "set it"),
        ({"ai": AI, "share": 0.5}, "oracle.share", "leave it out"),
        ({"ai": AI, "choose": "unsure"}, "oracle.unsure_below", "set it"),
        ({"ai": AI, "overlap": 0.5}, "oracle.overlap", "n_annotators"),
        ({"ai": AI, "prob_slight": 0.6}, "oracle.prob_slight", "answers=strength"),
        ({"ai": AI, "answers": "strength", "prob_slight": 0.99}, "oracle.prob_slight", "no more than"),
        ({"ai": AI, "max_wait_s": 60, "call_timeout_s": 30.0}, "oracle.call_timeout_s", "leave it out"),
        ({"ai": AI, "max_wait_s": -1}, "oracle.max_wait_s", ""),
        ({"ai": "sentiment"}, "oracle.ai", "it is a section"),
    ],
)
def test_what_cannot_work_is_refused(knobs, field, fix):
    with pytest.raises(ConfigError) as error:
        component({"name": "human", **knobs}, "oracle", "oracles", Oracle)
    assert error.value.field == field
    assert fix in (error.value.fix or "")


@pytest.mark.parametrize("iterations", [1, 2])
def test_how_long_late_answers_are_asked_for(tmp_path, iterations):
    oracle = human(tmp_path, ai=AI, expire_iterations=iterations)
    judged(oracle, [query(1, iteration=1)])
    judged(oracle, [query(2, iteration=2)])
    queue = Queue(tmp_path)
    queue.look()
    assert ["prompt 1" in one.prompt for one in queue.open()] == ([False] if iterations == 1 else [False, True])


def test_a_damaged_queue_stops_the_run(tmp_path):
    judged(human(tmp_path, ai=AI), [query(0), query(1)])
    path = tmp_path / QUESTIONS
    path.write_bytes(path.read_bytes().replace(b"prompt 0", b"prompt 7"))
    with pytest.raises(OracleError, match="does not agree with its checksum"):
        human(tmp_path, ai=AI)


def test_the_version_is_that_of_what_is_asked_and_not_of_how_long(tmp_path):
    one = human(None, ai=AI).version
    assert human(None, ai=AI, max_wait_s=60, per_iteration=3, undo_s=1.0).version == one
    for knobs in ({"prob_clear": 0.9}, {"choose": "random", "share": 0.5}, {"n_annotators": 2}, {"seed": 1}):
        assert human(None, ai=AI, **knobs).version != one
    assert human(None, max_wait_s=60).version != one


def test_it_is_stored_and_read_back_with_and_without_the_other_oracle():
    for built in (human(None, ai=AI), human(None, max_wait_s=60)):
        again = component({"name": "human", **built.model_dump(mode="json")}, "oracle", "oracles", Oracle)
        assert (again.model_dump(), again.version) == (built.model_dump(), built.version)


def test_longer_is_what_the_stand_in_for_people_says():
    question = type("Question", (), {"left": "a", "right": "bb"})
    assert longer(question) == "right"  # type: ignore[arg-type]
