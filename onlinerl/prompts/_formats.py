"""Published forms of prompts and preferences, recognised by their columns.

Each is turned into a row with `text` or `messages`, and `reference_answer` where there is one. The forms are those that the documentations
of TRL ("Dataset formats and types"), OpenRLHF and verl describe, ShareGPT's and Alpaca's, Anthropic's transcripts, and questions with
answers as GSM8K has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Found = dict[str, Any]
"""`prompt`: a text or a list of messages; perhaps `reference_answer`, `source`, `plain` (a text that is continued, whatever the model)."""

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}


class NoPrompt(ValueError):
    """A row has no prompt that can be told from the rest."""


class Format(NamedTuple):
    """A published form."""

    name: str
    needs: tuple[str, ...]
    """Columns by which it is recognised."""
    read: Callable[[Row], Found]


def recognised(columns: Sequence[str]) -> Format | None:
    """The first form that has these columns; None if there is none."""
    return next((form for form in FORMATS if all(column in columns for column in form.needs)), None)


def transcript(text: str) -> list[dict[str, str]] | None:
    """Messages of `\\n\\nHuman: ...\\n\\nAssistant: ...`; None if that is not how the text begins."""
    before, *parts = _TURN.split(text if text.startswith("\n") else f"\n\n{text}")
    if before.strip() or not parts:
        return None
    turns = [(_ROLES[name.lower()], said.strip()) for name, said in zip(parts[0::2], parts[1::2], strict=True)]
    if turns[-1] == ("assistant", ""):  # a prompt that ends where the answer begins
        turns.pop()
    return [{"role": role, "content": content} for role, content in turns]


def split(messages: Sequence[Mapping[str, Any]]) -> Found:
    """A conversation: what comes before the last answer, and that answer.

    Raises:
        NoPrompt: if an entry is no message.
    """
    if not all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in messages):
        raise NoPrompt("an entry of the conversation is no {role, content}")
    turns = [{"role": each["role"], "content": each["content"]} for each in messages]
    if turns and turns[-1]["role"] == "assistant":
        return {"prompt": turns[:-1], "reference_answer": turns[-1]["content"]}
    return {"prompt": turns}


def asked(value: object) -> Found:
    """A prompt as a text, a transcript or a list of messages."""
    if isinstance(value, str):
        turns = transcript(value) if _TURN.search(value) else None
        return {"prompt": value} if turns is None else split(turns)
    if isinstance(value, Sequence):
        return split(value)
    raise NoPrompt(f"the prompt is {value!r}, neither text nor messages")


def _first(row: Row, *columns: str) -> Any:
    """The first of these columns that holds something."""
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)


def _answer(row: Row) -> Found:
    said = _first(row, "reference_answer", "answer")
    return {} if said is None else {"reference_answer": said}


def preferences(row: Row) -> Found:
    """TRL's preferences, and Anthropic's, where prompt and answer are one transcript. The chosen answer counts as the reference answer."""
    chosen, given = row["chosen"], row.get("prompt")
    if isinstance(chosen, str) and given is not None:
        return {**asked(given), "reference_answer": chosen}
    whole = transcript(chosen) if isinstance(chosen, str) else chosen
    if not whole:
        raise NoPrompt("`chosen` is no conversation, and there is no `prompt`")
    found = split(whole)
    if found["prompt"] or given is None:
        return found
    return {**asked(given), "reference_answer": found["reference_answer"]}


def _prompts(row: Row) -> Found:
    said = _first(row, "completion", "solution", "reference_answer", "answer", "ground_truth", "response")
    if isinstance(said, list) and said and isinstance(said[-1], Mapping):
        said = said[-1].get("content")
    wanted = row.get("label") is not False  # of TRL's unpaired preferences, half are answers that were not
    return {**asked(row["prompt"]), **({"reference_answer": said} if wanted else {})}


def _verl(row: Row) -> Found:
    return {
        **asked(row["prompt"]),
        "reference_answer": row["reward_model"].get("ground_truth"),
        "source": row.get("data_source"),
    }


def _sharegpt(row: Row) -> Found:
    turns = row["conversations"]
    if all("from" in turn for turn in turns):
        turns = [{"role": _ROLES.get(str(turn["from"]).lower(), turn["from"]), "content": turn.get("value")} for turn in turns]
    return split(turns)


def _instruction(row: Row) -> Found:
    more = _first(row, "input", "context")
    whole = f"{row['instruction']}\n\n{more}" if more else row["instruction"]
    return {"prompt": whole, "reference_answer": _first(row, "output", "response")}


def _question(row: Row) -> Found:
    return {"prompt": row["question"], "reference_answer": _first(row, "answer", "solution", "final_answer")}


def _problem(row: Row) -> Found:
    return _question({**row, "question": row["problem"]})


def _openrlhf(row: Row) -> Found:
    return {**asked(row["input"]), "reference_answer": _first(row, "label", "output")}


FORMATS = (
    Format("texts", ("text",), lambda row: {"prompt": row["text"], "plain": True, **_answer(row)}),
    Format("messages", ("messages",), lambda row: {**split(row["messages"]), **_answer(row)}),
    Format("ShareGPT", ("conversations",), _sharegpt),
    Format("verl", ("prompt", "reward_model"), _verl),
    Format("preferences (TRL)", ("prompt", "chosen"), preferences),
    Format("preferences (TRL), with the prompt in the answers", ("chosen", "rejected"), preferences),
    Format("prompts (TRL)", ("prompt",), _prompts),
    Format("instructions (Alpaca)", ("instruction",), _instruction),
    Format("questions", ("question",), _question),
    Format("problems", ("problem",), _problem),
    Format("OpenRLHF", ("input",), _openrlhf),
    Format("OpenRLHF, as messages", ("context_messages",), lambda row: split(row["context_messages"])),
)
"""In the order in which they are tried."""
