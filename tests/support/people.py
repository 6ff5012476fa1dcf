"""A toy that stands in for people: a thread that answers what is in a queue, as a person at the page would."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onlinerl.people.queue import QUESTIONS, Answer, Choice, Question, Queue

Says = Callable[[Question], Choice]
PATIENCE_S = 60


def longer(question: Question) -> Choice:
    """The longer answer is better."""
    left, right = len(question.left), len(question.right)
    return "tie" if left == right else "left" if left > right else "right"


def said(question: Question, choice: Choice, annotator: str = "ann", **more: object) -> Answer:
    """An answer, given just now."""
    given = {"submission": uuid.uuid4().hex, "at": time.time(), **more}
    return Answer(question=question.id, annotator=annotator, choice=choice, **given)


@contextmanager
def answering(folder: Path, says: Says = longer, annotators: tuple[str, ...] = ("ann",)) -> Iterator[list[Question]]:
    """Answers everything that comes until the end of the block; gives the questions that were answered."""
    over, answered = threading.Event(), list[Question]()

    def work() -> None:
        queue = Queue(folder)
        while not over.wait(0.01):
            if not (folder / QUESTIONS).exists():
                continue
            queue.look()
            for question in queue.open():
                for annotator in annotators:
                    if queue.answer(said(question, says(question), annotator)) == "saved":
                        answered.append(question)

    thread = threading.Thread(target=work, name="people", daemon=True)
    thread.start()
    try:
        yield answered
    finally:
        over.set()
        thread.join(PATIENCE_S)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)
