"""The queue of comparisons for people: what is kept whatever is killed, who gets which question, how far they agree; and its server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from people import said

from onlinerl import annotation
from onlinerl.errors import ConfigError, StoreError
from onlinerl.people.agreement import agreement
from onlinerl.people.export import rows
from onlinerl.people.journal import Journal
from onlinerl.people.queue import ANSWERS, QUESTIONS, Question, Queue, identity
from onlinerl.people.server import LEASE_S, Desk, Server
from onlinerl.types import Message, Prompt

TOKEN = "a-token-for-tests-only"


def question(number: int, **more: Any) -> Question:
    usual = {"left": f"left {number}", "right": f"right {number}", "iteration": 1}
    return Question(id=f"q{number}", prompt=f"prompt {number}", messages=(), **{**usual, **more})


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "oracle")


def ids(questions: list[Question]) -> list[str]:
    return [one.id for one in questions]


# --- the journal ---


def test_a_journal_gives_what_is_new_and_what_others_have_written(tmp_path):
    writer, reader = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    assert reader.news() == []
    writer.append([{"a": 1}, {"b": "ä\n"}])
    assert (reader.news(), reader.news()) == ([{"a": 1}, {"b": "ä\n"}], [])
    assert writer.news() == [{"a": 1}, {"b": "ä\n"}]
    writer.append([{"c": 3}])
    assert reader.news() == [{"c": 3}]


def test_a_journal_torn_at_any_byte_loses_only_its_last_line(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append([{"a": 1}])
    journal.news()
    journal.append([{"b": 2}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        again = Journal(path)
        assert again.news() == [{"a": 1}]
        again.append([{"c": 3}])
        assert Journal(path).news() == [{"a": 1}, {"c": 3}]


def test_a_flipped_bit_before_the_last_line_is_damage(tmp_path):
    path = tmp_path / "j"
    Journal(path).append([{"a": 1}, {"b": 2}])
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"x"'))
    with pytest.raises(StoreError, match="does not agree with its checksum"):
        Journal(path).news()


def test_every_flipped_bit_of_the_last_line_is_damage_too(tmp_path):
    """It was on the disk before anybody was told of it, so it is no torn tail."""
    path = tmp_path / "j"
    Journal(path).append([{"a": 1}])
    (journal := Journal(path)).news()
    journal.append([{"b": "two words"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for bit in range(8 * first, 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=f"the line at byte {first} does not agree with its checksum"):
            Journal(path).news()


def test_blocks_that_a_power_cut_left_unwritten_are_ignored(tmp_path):
    path = tmp_path / "j"
    Journal(path).append([{"a": 1}])
    path.write_bytes(path.read_bytes() + bytes(40) + b"\n")
    assert Journal(path).news() == [{"a": 1}]


def test_a_run_that_was_started_afresh_is_not_taken_for_the_one_before(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append([{"a": 1}])
    journal.news()
    path.rename(tmp_path / "aside")
    Journal(path).append([{"a": 1}, {"b": 2}])
    with pytest.raises(StoreError, match="another file is in its place"):
        journal.news()


# --- the queue ---


def test_the_same_comparison_is_one_question_in_whatever_order():
    prompt = Prompt(id="p", text="a", token_ids=(1,))
    assert identity(prompt, "x", "y") == identity(prompt, "y", "x")
    assert identity(prompt, "x", "y") != identity(replace(prompt, text="b"), "x", "y")
    assert identity(prompt, "x", "y") != identity(replace(prompt, messages=(Message(role="user", content="a"),)), "x", "y")


def test_an_answer_is_kept_once_however_often_it_is_sent(queue, tmp_path):
    queue.put([question(1)])
    answer = said(question(1), "left")
    assert [queue.answer(answer) for _ in range(3)] == ["saved"] * 3
    again = Queue(tmp_path / "oracle")
    assert again.answer(answer) == "saved"
    assert again.answer(said(question(1), "right")) == "answered"
    assert again.answer(said(question(1), "right", "bob")) == "closed"
    assert again.answers("q1") == [answer]
    assert (tmp_path / "oracle" / ANSWERS).read_bytes().count(b"\n") == 1


def test_a_question_is_put_once_however_often_a_run_asks(queue, tmp_path):
    queue.put([question(1), question(2)])
    queue.put([question(2), question(1), question(1)])
    Queue(tmp_path / "oracle").put([question(1)])
    assert (tmp_path / "oracle" / QUESTIONS).read_bytes().count(b"\n") == 2


def test_what_was_taken_back_is_asked_again_and_what_the_run_has_is_not(queue):
    queue.put([question(1)])
    first = said(question(1), "left")
    queue.answer(first)
    assert queue.open() == []
    assert [queue.undo("bob", first.submission), queue.undo("ann", "nobody's")] == ["unknown", "unknown"]
    assert [queue.undo("ann", first.submission) for _ in range(2)] == ["undone", "undone"]
    assert ids(queue.open()) == ["q1"]
    second = said(question(1), "right")
    queue.answer(second)
    assert queue.take(["q1"], older_than_s=0) == [second]
    assert queue.undo("ann", second.submission) == "taken"
    assert queue.answers("q1") == [second]
    assert queue.answer(said(question(1), "tie", "bob")) == "closed"


def test_a_clock_that_is_set_back_makes_no_run_wait_for_it(queue):
    queue.put([question(1)])
    answer = said(question(1), "left", at=time.time() + 86400)
    queue.answer(answer)
    assert queue.take(["q1"], older_than_s=5) == [answer]


def test_a_run_waits_until_an_answer_cannot_be_taken_back(queue):
    queue.put([question(1)])
    answer = said(question(1), "left")
    queue.answer(answer)
    assert queue.take(["q1"], older_than_s=3600) is None
    assert queue.take(["q1"], older_than_s=3600, whatever=True) == [answer]
    assert queue.take(["q1"], older_than_s=3600) == [answer], "what was taken stays so"


def test_several_are_asked_where_several_are_needed(queue):
    queue.put([question(1, needed=2)])
    first, second = said(question(1), "left"), said(question(1), "right", "bob")
    queue.answer(first)
    assert (ids(queue.open()), queue.take(["q1"], older_than_s=0)) == (["q1"], None)
    queue.answer(second)
    assert (queue.open(), queue.take(["q1"], older_than_s=0)) == ([], [first, second])
    assert queue.answer(said(question(1), "left", "cat")) == "closed"


def test_late_questions_come_behind_those_that_are_awaited_and_expire(queue):
    queue.put([question(1), question(2), question(3, iteration=2)])
    queue.give_up(["q1", "q3"])
    assert ids(queue.open()) == ["q2", "q3", "q1"]
    late = said(question(1), "left")
    assert queue.answer(late) == "saved"
    assert [answer.late for answer in queue.answers("q1")] == [True]
    queue.put([question(9, iteration=5)])
    assert ids(queue.open()) == ["q2", "q9"], "three iterations later nobody is asked"
    queue.put([question(3, iteration=5)])
    assert ids(queue.open()) == ["q2", "q3", "q9"], "unless the run wants it again"


def test_threads_and_processes_at_once_lose_and_repeat_nothing(tmp_path):
    folder = tmp_path / "oracle"
    Queue(folder).put([question(n) for n in range(20)])

    def answer(who: str) -> None:
        queue = Queue(folder)
        queue.look()
        for n in range(20):
            queue.answer(said(question(n), "left", who))

    threads = [threading.Thread(target=answer, args=(f"a{n}",)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    queue = Queue(folder)
    queue.look()
    assert [len(queue.answers(f"q{n}")) for n in range(20)] == [1] * 20


KILLED = """
import sys
from pathlib import Path
from people import said
from onlinerl.people.queue import Queue
queue = Queue(Path(sys.argv[1]))
queue.look()
for question in queue.open():
    queue.answer(said(question, "left"))
    print(question.id, flush=True)
"""


def test_kill_nine_loses_no_answer_that_was_confirmed(tmp_path):
    folder = tmp_path / "oracle"
    Queue(folder).put([question(n) for n in range(400)])
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "support")])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    confirmed = [process.stdout.readline().strip() for _ in range(7)]
    process.send_signal(signal.SIGKILL)
    confirmed += process.communicate()[0].split()
    queue = Queue(folder)
    queue.look()
    answered = [one.id for one in queue.questions() if queue.answers(one.id)]
    assert answered[: len(confirmed)] == confirmed
    assert len(answered) - len(confirmed) <= 1, "what was on the disk and not yet said"
    assert queue.answer(said(question(399), "left")) == "saved"


# --- agreement ---


def test_kappa_against_a_table_computed_by_hand():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, by chance 0.5, kappa 0.4."""
    counts = {("left", "left"): 20, ("left", "right"): 5, ("right", "left"): 10, ("right", "right"): 15}
    both = [[said(question(0), one), said(question(0), other, "bob")] for (one, other), n in counts.items() for _ in range(n)]
    found = agreement([*both, [said(question(0), "left")], [said(question(0), "left"), said(question(0), "skip", "bob")]])
    assert (found.share, found.answers) == (0.7, 50)
    assert found.kappa == pytest.approx(0.4)
    assert found.kappa_se == pytest.approx((0.7 * 0.3 / 50) ** 0.5 / 0.5)


def test_a_tie_and_both_bad_are_the_same_and_one_answer_for_all_has_no_kappa():
    found = agreement([[said(question(0), "tie"), said(question(0), "both_bad", "bob")]])
    assert (found.share, found.kappa, found.answers) == (1.0, None, 1)
    assert agreement([]) == replace(found, share=None, answers=0)


# --- what people have said, as data ---


def test_decided_comparisons_are_preference_data(queue):
    queue.put([question(n, needed=3, strength=n == 2) for n in range(4)])
    for n, choices in enumerate((("left", "left", "tie"), ("left", "right", "skip"), ("right", "right", "right"), ("skip",))):
        for who, choice in zip(("ann", "bob", "cat"), choices, strict=False):
            queue.answer(said(question(n), choice, who, strength="clear" if n == 2 else None))
    first, second = rows(queue)
    assert (first["chosen"], first["rejected"], first["prompt"]) == ("left 0", "right 0", "prompt 0")
    assert first["prob"] == first["p"] == pytest.approx(2.5 / 3)
    assert (second["chosen"], second["p"], second["strength"]) == ("right 2", 1.0, 2)
    assert (second["annotators"], second["late"]) == (["ann", "bob", "cat"], False)


# --- who gets what ---


def test_two_people_do_not_get_the_same_comparison_unless_both_are_needed(queue):
    queue.put([question(1), question(2), question(3, needed=2)])
    desk = Desk(queue)
    first, second = desk.state("ann")["question"]["id"], desk.state("bob")["question"]["id"]
    assert (first, second) == ("q1", "q2")
    assert desk.state("ann", first)["question"]["id"] == first, "it stays before them"
    assert [desk.state(who)["question"]["id"] for who in ("cat", "dan")] == ["q3", "q3"]
    assert desk.state("eve")["question"] is None
    again = Desk(queue)  # the server was killed: pages say what they hold
    assert again.state("bob", "q2")["question"]["id"] == "q2"
    assert again.state("ann", "q1")["question"]["id"] == "q1"


def test_a_question_that_somebody_has_left_goes_to_others(queue, monkeypatch):
    queue.put([question(1)])
    desk = Desk(queue)
    assert desk.state("ann")["question"]["id"] == "q1"
    assert desk.state("bob")["question"] is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + LEASE_S + 1)
    assert desk.state("bob")["question"]["id"] == "q1"


@pytest.mark.parametrize("gold", [None, "right"])
def test_nobody_is_told_who_wrote_what_or_that_the_answer_is_known(queue, gold):
    queue.put([question(1, gold=gold)])
    shown = Desk(queue).state("ann")["question"]
    assert set(shown) == {"id", "messages", "left", "right", "strength", "late"}


def test_who_is_right_where_the_answer_is_known_is_in_the_summary_and_nowhere_else(queue):
    queue.put([question(1), question(2, gold="right"), question(3, gold="left")])
    for number, choice in ((1, "left"), (2, "right"), (3, "tie")):
        assert queue.answer(said(question(number), choice)) == "saved"
    assert queue.answer(said(question(2), "left", "bob")) == "closed"
    found = annotation.summary(queue.folder)
    assert found["gold_accuracy"] == {"ann": {"share": 0.75, "answers": 2}}
    assert (found["questions"], found["answered"], len(rows(queue))) == (1, 1, 1)


# --- the server ---


@pytest.fixture
def ask(queue):
    """Sends requests to a server of the queue; returns status, headers and body."""
    with Server(("127.0.0.1", 0), queue, TOKEN) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def send(method: str, path: str, body: Any = None, token: str | None = TOKEN, **headers: str) -> tuple[int, Any, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            sent = {**({} if token is None else {"Authorization": f"Bearer {token}"}), **headers}
            connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), sent)
            reply = connection.getresponse()
            data = reply.read()
            connection.close()
            return (
                reply.status,
                reply.headers,
                json.loads(data) if reply.headers["Content-Type"] == "application/json" else data,
            )

        yield send
        server.shutdown()


def an_answer(**more: Any) -> dict[str, Any]:
    return {"question": "q1", "annotator": "ann", "choice": "left", "submission": "submission-1", **more}


def test_nothing_but_the_page_is_given_without_the_token(queue, ask):
    queue.put([question(1)])
    for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"):
        if token != "é":
            assert ask("GET", "/api/state?annotator=ann", token=token)[0] == 401
            assert ask("POST", "/api/answer", an_answer(), token=token)[0] == 401
            assert ask("POST", "/api/undo", {}, token=token)[0] == 401
    status, _, body = ask("POST", "/api/answer", an_answer(), token=None, Cookie=f"token={TOKEN}", Origin="http://evil.example")
    assert (status, "token" in body["error"]) == (401, True), "what another site can make a browser send is not enough"
    assert queue.answers("q1") == []
    for path in ("/", "/page.css", "/page.js"):
        status, headers, body = ask("GET", path, token=None)
        assert status == 200
        assert TOKEN.encode() not in body
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")


def test_the_page_needs_nothing_from_elsewhere(ask):
    for path in ("/", "/page.css", "/page.js"):
        body = ask("GET", path, token=None)[2].decode()
        assert "http://" not in body
        assert "https://" not in body
        assert "innerHTML" not in body


def test_answers_and_undo_over_http(queue, ask):
    queue.put([question(1), question(2)])
    status, _, state = ask("GET", "/api/state?annotator=ann")
    assert (status, state["question"]["id"], state["open"], state["mine"], state["undo"]) == (200, "q1", 2, 0, None)
    for _ in range(2):
        status, _, state = ask("POST", "/api/answer", an_answer(seconds=2.5))
        assert (status, state["question"]["id"], state["mine"], state["undo"]) == (200, "q2", 1, "submission-1")
    assert queue.answers("q1")[0].seconds == 2.5
    assert ask("POST", "/api/answer", an_answer(submission="submission-2"))[0] == 409
    status, _, state = ask("POST", "/api/undo", {"annotator": "ann", "submission": "submission-1"})
    assert (status, state["question"]["id"], state["mine"]) == (200, "q1", 0)
    ask("POST", "/api/answer", an_answer(submission="submission-3", choice="right"))
    queue.take(["q1"], older_than_s=0)
    status, _, said = ask("POST", "/api/undo", {"annotator": "ann", "submission": "submission-3"})
    assert (status, said["error"]) == (409, "the run has it already")
    assert ask("GET", "/api/state?annotator=ann")[2]["undo"] is None


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/state", None, 400),
        ("GET", "/api/state?annotator=a%20b", None, 400),
        ("GET", "/etc/passwd", None, 404),
        ("GET", "/../people/server.py", None, 404),
        ("POST", "/api/answer", b"no json", 400),
        ("POST", "/api/answer", [1], 400),
        ("POST", "/api/answer", an_answer(choice="best"), 400),
        ("POST", "/api/answer", an_answer(strength="very"), 400),
        ("POST", "/api/answer", an_answer(annotator=""), 400),
        ("POST", "/api/answer", an_answer(annotator=7), 400),
        ("POST", "/api/answer", an_answer(submission="x"), 400),
        ("POST", "/api/answer", an_answer(question="q7"), 404),
        ("POST", "/api/answer", {"padding": "x" * (1 << 17)}, 413),
        ("POST", "/api/undo", {"annotator": "ann", "submission": "submission-9"}, 404),
    ],
)
def test_what_is_no_request_is_refused_and_changes_nothing(queue, ask, method, path, body, status):
    queue.put([question(1)])
    assert ask(method, path, body)[0] == status
    assert queue.answers("q1") == []
    assert ask("GET", "/api/state?annotator=ann")[0] == 200


def test_a_damaged_queue_is_said(queue, ask):
    queue.put([question(1), question(2)])
    path = queue.folder / QUESTIONS
    path.write_bytes(path.read_bytes().replace(b"prompt 1", b"prompt 7"))
    with Server(("127.0.0.1", 0), Queue(queue.folder), TOKEN) as server, pytest.raises(StoreError, match="checksum"):
        server.desk.state("ann")


# --- the command ---


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path, monkeypatch):
    monkeypatch.delenv(annotation.TOKEN_ENV, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    first = annotation.token()
    path = tmp_path / ".onlinerl/people_token"
    assert (len(first) >= 32, path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (True, 0o600, 0o700)
    path.chmod(0o644)
    assert annotation.token() == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["people_token"]
    monkeypatch.setenv(annotation.TOKEN_ENV, "of-the-environment")
    assert annotation.token() == "of-the-environment"
    monkeypatch.setenv(annotation.TOKEN_ENV, "short")
    with pytest.raises(ConfigError, match="16 or more"):
        annotation.token()


def test_an_address_of_others_is_warned_about_and_one_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(annotation.TOKEN_ENV, TOKEN)
    Queue(tmp_path).put([question(1)])
    monkeypatch.setattr(Server, "serve_forever", lambda self: None)
    told: list[str] = []
    annotation.serve(tmp_path, "127.0.0.1", 0, told.append)
    assert told[0].startswith("people answer at http://127.0.0.1:")
    assert told[0].endswith(f"/#token={TOKEN}")
    told.clear()
    annotation.serve(tmp_path, "0.0.0.0", 0, told.append)
    assert "can be reached by others" in told[0]
    with pytest.raises(ConfigError, match="choose another --host or --port"):
        annotation.serve(tmp_path, "192.0.2.1", 0, told.append)


def test_a_run_that_asks_nobody_is_refused(tmp_path, toy_config):
    with pytest.raises(StoreError, match="holds no run"):
        annotation.queue(tmp_path / "nothing")
    toy_config(tmp_path, file="config.yaml", name=tmp_path.name, runs=str(tmp_path.parent))
    with pytest.raises(ConfigError, match="is not one that asks people"):
        annotation.queue(tmp_path)
