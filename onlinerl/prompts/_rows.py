"""One row of a user's data -> a prompt, or an error that says where and why."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from onlinerl.errors import PromptError
from onlinerl.types import Message, RawPrompt

# Strings that only a chat template or a tokenizer writes.
_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<s>",
    "</s>",
    "<｜",
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an error is."""

    place: str
    field: str

    def fail(self, cause: str, fix: str) -> NoReturn:
        raise PromptError(f"{self.place}: {cause}", field=self.field, fix=fix) from None


def prompt(row: Mapping[str, object], where: Place, source: str) -> RawPrompt:
    """The prompt in a row that has `text` or `messages`, and perhaps `id`, `reference_answer` or `answer`, `source` and `difficulty`.

    Args:
        row: its values.
        where: where it is written.
        source: what it counts as coming from, where it does not say so itself.

    Raises:
        PromptError: naming the place, the cause and the fix.
    """
    if ("text" in row) == ("messages" in row):
        both = "both text and messages" if "text" in row else "neither text nor messages"
        where.fail(f"has {both}", "give text for plain continuation, or messages for a conversation")
    messages = _messages(row["messages"], where) if "messages" in row else ()
    text = "" if messages else _string(row, "text", where)
    for content in (text, *(message.content for message in messages)):
        marker = next((marker for marker in _MARKERS if marker in content), None)
        if marker is not None:
            where.fail(
                f"holds {marker!r}, so a template was applied to it already",
                'give the raw words: {"messages": [{"role": "user", "content": "..."}]} for a conversation; onlinerl applies the '
                "model's chat template itself",
            )
    return RawPrompt(
        id=_content_id(text, messages) if row.get("id") is None else _id(row["id"], where),
        text=text,
        messages=messages,
        reference_answer=_answer(row, where),
        source=_string(row, "source", where) if "source" in row else source,
        difficulty=_difficulty(row, where),
        place=where.place,
    )


def _messages(value: object, where: Place) -> tuple[Message, ...]:
    fix = 'write "messages": [{"role": "user", "content": "..."}]'
    if not isinstance(value, list) or not value:
        where.fail("messages must be a list with at least one message", fix)
    messages: list[Message] = []
    for entry in value:
        if not isinstance(entry, dict) or set(entry) != {"role", "content"}:
            where.fail("each message must have exactly the keys role and content", fix)
        if not all(isinstance(entry[key], str) for key in entry):
            where.fail("role and content of a message must be strings", fix)
        messages.append(Message(role=entry["role"], content=entry["content"]))
    if messages[-1].role == "assistant":
        where.fail("ends with an assistant message, so there is nothing to answer", "end the conversation with a user message")
    if not messages[-1].content.strip():
        where.fail("the last message is empty", fix)
    return tuple(messages)


def _string(row: Mapping[str, object], key: str, where: Place) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        where.fail(f"{key} must be a string that is not empty, got {value!r}", f'write "{key}": "..."')
    return value


def _answer(row: Mapping[str, object], where: Place) -> str | None:
    given = [row[key] for key in ("reference_answer", "answer") if row.get(key) is not None]
    if len(given) > 1:
        where.fail("has both reference_answer and answer", "keep reference_answer")
    if not given:
        return None
    known = isinstance(given[0], str | int | float) and not isinstance(given[0], bool) and given[0] == given[0]  # NaN is none
    if not known or not str(given[0]).strip():
        where.fail(f"the reference answer must be a string or a number, got {given[0]!r}", 'write "reference_answer": "..."')
    return str(given[0])


def _difficulty(row: Mapping[str, object], where: Place) -> float | None:
    value = row.get("difficulty")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        where.fail(f"difficulty must be a finite number, got {value!r}", 'write "difficulty": 0.5, more for what is harder')
    return float(value)


def _id(value: object, where: Place) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        where.fail(f"id must be a string or a number, got {value!r}", "give each prompt its own id, or none at all")
    return str(value)


def _content_id(text: str, messages: Sequence[Message]) -> str:
    content = json.dumps([text, [[message.role, message.content] for message in messages]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def question(asked: RawPrompt) -> str:
    """What is asked, whatever the id, case and spacing."""
    words = [asked.text, *(f"{message.role} {message.content}" for message in asked.messages)]
    return " ".join("\n".join(words).lower().split())
