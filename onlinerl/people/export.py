"""What people have said as preference data, as `train-rm` and `calibrated` read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from onlinerl.people.queue import Answer, Question, Queue


def rows(queue: Queue) -> list[dict[str, Any]]:
    """One for each question that people have decided; not those whose answers are even.

    `prob` and `p`: the share of the answers that name the winner, a tie being half to both; `strength` is 2 where all who say how much find
    it clear, else 1.
    """
    queue.look()
    found = ((question, queue.answers(question.id)) for question in queue.questions())
    return [row for question, answers in found if (row := _row(question, answers)) is not None]


def _row(question: Question, answers: Sequence[Answer]) -> dict[str, Any] | None:
    said = [answer for answer in answers if answer.choice != "skip"]
    votes = Counter[str](answer.choice for answer in said)
    if votes["left"] == votes["right"]:
        return None
    chosen, rejected = ("left", "right") if votes["left"] > votes["right"] else ("right", "left")
    share = (votes[chosen] + (len(said) - votes[chosen] - votes[rejected]) / 2) / len(said)
    messages = [{"role": role, "content": content} for role, content in question.messages]
    row: dict[str, Any] = {
        "prompt": messages or question.prompt,
        "chosen": getattr(question, chosen),
        "rejected": getattr(question, rejected),
        "prob": share,
        "p": share,
    }
    if question.strength:
        row["strength"] = 2 if all(answer.strength == "clear" for answer in said if answer.choice == chosen) else 1
    shown = {"shown_left": chosen == "left", "iteration": question.iteration, "heldout": question.heldout}
    who = {"annotators": [answer.annotator for answer in said], "late": any(answer.late for answer in said)}
    return {**row, "source": "people", **shown, **who}
