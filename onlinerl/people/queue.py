"""The queue of comparisons in a run directory: the run puts questions, the page puts answers, and each reads what the other has written.

Two journals. `questions.jsonl` is written by the run: a question, that the run waits for some, that it has gone on without them, that it has
taken what people have said about them. `answers.jsonl` is written by the page: an answer, an answer that was taken back. Whoever decides
something holds `people.lock` from reading both to writing: so an answer that the run has taken cannot be taken back, and a question never
gets more answers than it asks for. Both sides may be killed at any time; what was said is read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from onlinerl import durable
from onlinerl.people.journal import Journal
from onlinerl.types import Prompt

Choice = Literal["left", "right", "tie", "both_bad", "skip"]
CHOICES = ("left", "right", "tie", "both_bad", "skip")
Strength = Literal["clear", "slight"]
QUESTIONS, ANSWERS, LOCK = "questions.jsonl", "answers.jsonl", "people.lock"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which of two responses is better."""

    id: str
    """Of what is asked: the same prompt and the same two texts, in whatever order, are one question."""
    prompt: str
    messages: tuple[tuple[str, str], ...]
    """Role and content; none for a plain text."""
    left: str
    right: str
    iteration: int
    heldout: bool = False
    needed: int = 1
    """People who are asked, each once."""
    strength: bool = False
    """Whether they say how much better it is."""
    expires: int = 3
    """After so many further iterations nobody is asked any more."""
    gold: Literal["left", "right"] | None = None
    """Which one is known to be better, of a question that only shows who reads: nothing is trained on it, and no run waits for it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one person has said about one question."""

    question: str
    annotator: str
    choice: Choice
    strength: Strength | None = None
    submission: str
    """By which the same answer is recognised when it is sent again."""
    at: float
    """Seconds since the epoch."""
    seconds: float | None = None
    """How long the person had the question."""
    late: bool = False
    """Whether the run had gone on without it."""


@dataclass
class _State:
    """Of one question."""

    question: Question
    status: Literal["waiting", "late", "taken"] = "waiting"
    answers: dict[str, Answer] = field(default_factory=dict)
    """By annotator."""


def identity(prompt: Prompt, one: str, other: str) -> str:
    """Of a question."""
    said = [prompt.text, [[m.role, m.content] for m in prompt.messages], *sorted((one, other))]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:20]


class Queue:
    """Of one oracle of one run. Any thread may call it, and any process may have one.

    Args:
        folder: in which it is kept.

    Raises:
        StoreError: from every method, if a file is damaged or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._questions, self._answers = Journal(folder / QUESTIONS), Journal(folder / ANSWERS)
        self._states: dict[str, _State] = {}
        self._submissions: dict[str, Answer] = {}
        self._undone: set[str] = set()
        self._put_in: dict[int, set[str]] = {}
        self._newest = 0
        self._memory = threading.RLock()

    # --- what is there ---

    def look(self) -> None:
        """Read what was written since the last look."""
        with self._memory:
            answers = self._answers.news()  # the question of an answer was on the disk before it
            for entry in self._questions.news():
                self._question(entry)
            for entry in answers:
                self._answer(entry)

    def _question(self, entry: dict[str, Any]) -> None:
        if "question" in entry:
            said = entry["question"]
            question = Question(**{**said, "messages": tuple(map(tuple, said["messages"]))})
            self._states[question.id] = _State(question)
            self._newest = max(self._newest, question.iteration)
            if not question.heldout and question.gold is None:
                self._put_in.setdefault(question.iteration, set()).add(question.id)
        for status in ("waiting", "late", "taken"):
            for one in entry.get(status, ()):
                self._states[one].status = status

    def _answer(self, entry: dict[str, Any]) -> None:
        if "undo" in entry:
            answer = self._submissions[entry["undo"]]
            self._undone.add(answer.submission)
            self._states[answer.question].answers.pop(answer.annotator, None)
        else:
            answer = Answer(**entry["answer"])
            self._submissions[answer.submission] = answer
            self._states[answer.question].answers[answer.annotator] = answer

    def questions(self) -> list[Question]:
        """All that a run has put, in that order, without those whose answer is known."""
        with self._memory:
            return [state.question for state in self._states.values() if state.question.gold is None]

    def gold(self) -> list[Question]:
        """Those whose answer is known, in the order in which they were put."""
        with self._memory:
            return [state.question for state in self._states.values() if state.question.gold is not None]

    def answers(self, question: str) -> list[Answer]:
        """Those that count, in the order in which they came."""
        with self._memory:
            return list(self._states[question].answers.values())

    def question(self, question: str) -> Question:
        """By its id."""
        with self._memory:
            return self._states[question].question

    def status(self, question: str) -> str | None:
        """`waiting` for people, `late`: the run has gone on without them, or `taken`: it has what they said. None if it was never put."""
        with self._memory:
            return self._states[question].status if question in self._states else None

    def put_in(self, iteration: int) -> set[str]:
        """Ids of an iteration's questions, without those about held-out prompts."""
        with self._memory:
            return set(self._put_in.get(iteration, ()))

    def by(self, annotator: str) -> list[Answer]:
        """Those of one person that count, in the order in which they came."""
        with self._memory:
            return sorted(
                (state.answers[annotator] for state in self._states.values() if annotator in state.answers),
                key=lambda answer: answer.at,
            )

    def open(self) -> list[Question]:
        """Those that still need answers: first those that the run waits for, oldest first, then late ones, newest first. Those whose answer is
        known are among the first during their iteration, and gone afterwards."""
        with self._memory:
            waiting = [
                s
                for s in self._states.values()
                if s.status == "waiting" and not _complete(s) and not (s.question.gold and s.question.iteration < self._newest)
            ]
            late = [
                s
                for s in self._states.values()
                if s.status == "late" and not _complete(s) and self._newest - s.question.iteration < s.question.expires
            ]
            late.sort(key=lambda s: -s.question.iteration)
            return [state.question for state in (*waiting, *late)]

    # --- what a run does ---

    def put(self, questions: Sequence[Question]) -> None:
        """Ask people; those that are there already are not put again, and wait again unless people have said all that is needed."""
        with self._deciding():
            new = {one.id: one for one in questions if one.id not in self._states}
            again = [one.id for one in questions if one.id in self._states and self._states[one.id].status == "late"]
            entries: list[dict[str, Any]] = [{"question": asdict(one)} for one in new.values()]
            if again:
                entries.append({"waiting": again})
            if entries:
                self._questions.append(entries)
                self.look()

    def take(self, questions: Sequence[str], *, older_than_s: float, whatever: bool = False) -> list[Answer] | None:
        """What people have said about them, which nobody can take back from now on; None if that is not all yet.

        Args:
            questions: their ids.
            older_than_s: how old each answer must be: until then it can be taken back.
            whatever: take what is there, if it is anything.
        """
        self.look()
        if not self._takeable(questions, older_than_s, whatever):  # most of the time, and it costs no lock
            return None
        with self._deciding():
            if not self._takeable(questions, older_than_s, whatever):
                return None
            answered = [one for one in questions if self._states[one].answers]
            if new := [one for one in answered if self._states[one].status != "taken"]:
                self._questions.append([{"taken": new}])
                self.look()
            return [answer for one in answered for answer in self._states[one].answers.values()]

    def _takeable(self, questions: Iterable[str], older_than_s: float, whatever: bool) -> bool:
        states = [self._states[one] for one in questions]
        if whatever:
            return any(state.answers for state in states)
        return all(state.status == "taken" or (_complete(state) and _settled(state, older_than_s)) for state in states)

    def give_up(self, questions: Sequence[str]) -> None:
        """The run goes on without answers to those that have not been taken; people may still give them."""
        with self._deciding():
            if late := [one for one in questions if self._states[one].status == "waiting"]:
                self._questions.append([{"late": late}])
                self.look()

    # --- what people do ---

    def answer(self, answer: Answer) -> str:
        """Keep it, once: returns `saved`, or why not: `unknown`, `answered` (by this person), `closed` (others were faster)."""
        with self._deciding():
            if answer.submission in self._submissions:
                return "saved"
            state = self._states.get(answer.question)
            if state is None:
                return "unknown"
            if answer.annotator in state.answers:
                return "answered"
            if _complete(state) or state.status == "taken":
                return "closed"
            said = {**asdict(answer), "late": state.status == "late"}
            self._answers.append([{"answer": said}])
            self.look()
            return "saved"

    def undo(self, annotator: str, submission: str) -> str:
        """Take an answer back: returns `undone`, or why not: `unknown`, `taken` (the run has it)."""
        with self._deciding():
            if submission in self._undone:
                return "undone"
            answer = self._submissions.get(submission)
            if answer is None or answer.annotator != annotator:
                return "unknown"
            if self._states[answer.question].status == "taken":
                return "taken"
            self._answers.append([{"undo": submission}])
            self.look()
            return "undone"

    def answer_of(self, submission: str) -> Answer | None:
        """By its submission, also one that was taken back."""
        with self._memory:
            return self._submissions.get(submission)

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """Nobody else writes meanwhile, and all that is written was read."""
        with durable.explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self._memory:
                self.look()
                yield
        finally:
            os.close(lock)


def _complete(state: _State) -> bool:
    return len(state.answers) >= state.question.needed


def _settled(state: _State, older_than_s: float) -> bool:
    now = time.time()
    # One of the future was given before the clock was set back.
    return not any(0 <= now - answer.at < older_than_s for answer in state.answers.values())
