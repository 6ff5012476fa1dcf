"""Prompts from JSONL files.

Each line is one JSON object in one of two forms:

    {"text": "I watched this film on a train and"}                        the model continues the text
    {"messages": [{"role": "user", "content": "What is 6 times 7?"}]}     the model answers, through its chat template

Optional keys of both: `id` (unique; derived from the content if absent, so that moving or adding lines changes no other prompt),
`reference_answer` or `answer` (for verifiers), `source` (for slices; the file's name by default). Text must be raw: templates,
special tokens and end markers are added here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from onlinerl.config.paths import at_home
from onlinerl.errors import PromptError
from onlinerl.protocols.prompts import PromptsConfig, Which
from onlinerl.types import Message, RawPrompt

__all__ = ["Jsonl", "read_prompts"]

_KEYS = ("id", "text", "messages", "reference_answer", "answer", "source")
_MEANT = {
    "prompt": "text or messages",
    "question": "text, or messages for a chat model (and reference_answer for what an oracle verifies)",
}

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


class Jsonl(PromptsConfig):
    """Files of JSON lines; `train` and `heldout` are their paths, or `package:NAME` for one that ships with onlinerl."""

    name: str = "jsonl"

    def raw(self, which: Which) -> list[RawPrompt]:
        """Read and check one of the two files."""
        return read_prompts(getattr(self, which), f"prompts.{which}")

    def located(self) -> Jsonl:
        """With absolute paths."""
        paths = {
            key: path if path.startswith("package:") else str(at_home(path, f"prompts.{key}").absolute())
            for key, path in (("train", self.train), ("heldout", self.heldout))
        }
        return self.model_copy(update=paths)


def read_prompts(path: str, field: str = "prompts.train") -> list[RawPrompt]:
    """Read and check a prompt file; blank lines are skipped.

    Args:
        path: a file, or `package:NAME` for one that ships with onlinerl.
        field: the configuration key that named it, for messages.

    Raises:
        PromptError: naming the file and, where there is one, the line.
    """
    file = _find(path, field)
    prompts: list[RawPrompt] = []
    lines_by_id: dict[str, int] = {}
    # Split at \n only: str.splitlines would also split at separators that JSON allows inside strings.
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = _Line(f"{path}, line {number}", field)
        prompt = _parse(raw, where, source=file.name.removesuffix(".jsonl"))
        if prompt.id in lines_by_id:
            where.fail(
                f"has the same id as line {lines_by_id[prompt.id]}: {prompt.id!r}",
                "give each prompt its own id; without ids, the two lines hold the same prompt: remove one",
            )
        lines_by_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise PromptError(f"{path} holds no prompts", field=field, fix='write one per line, e.g. {"text": "Once upon a time"}')
    return prompts


@dataclass(frozen=True, slots=True)
class _Line:
    """Where an error is."""

    place: str
    field: str

    def fail(self, cause: str, fix: str) -> NoReturn:
        raise PromptError(f"{self.place}: {cause}", field=self.field, fix=fix) from None


def _find(path: str, field: str) -> Any:
    """An object with `name` and `read_bytes`: a file on disk, or one that ships with onlinerl."""
    if not path.startswith("package:"):
        file = Path(path)
        if not file.is_file():
            raise PromptError(
                f"there is no file {path}",
                field=field,
                fix="check the path (relative paths start where onlinerl was started), or use package:NAME for a file that ships",
            )
        return file
    name = path.removeprefix("package:")
    folder = resources.files("onlinerl.prompts") / "data"
    shipped = sorted(entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    if name not in shipped:
        raise PromptError(f"no prompts {name!r} ship with onlinerl", field=field, fix=f"choose one of {', '.join(shipped)}")
    return folder / f"{name}.jsonl"


def _parse(raw: bytes, where: _Line, source: str) -> RawPrompt:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        where.fail(f"is not UTF-8: {error}", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        where.fail(f"is not JSON: {error.msg} at column {error.colno}", "write one JSON object per line")
    except UnicodeEncodeError:
        where.fail("holds half of a surrogate pair, which is no text", "remove the \\ud8.. to \\udf.. that stands alone")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        where.fail(f"cannot be read: {error}", "write plain strings, and numbers of ordinary size")
    if not isinstance(row, dict):
        where.fail(f"holds a JSON {type(row).__name__}, not an object", 'write e.g. {"text": "Once upon a time"}')
    for key in row:
        if key not in _KEYS:
            close = _MEANT.get(key) or " or ".join(get_close_matches(key, _KEYS, n=1))
            hint = f"did you mean {close}? " if close else ""
            where.fail(f"has the unknown key {key!r}", f"{hint}known keys: {', '.join(_KEYS)}")
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
        place=where.place,
    )


def _messages(value: object, where: _Line) -> tuple[Message, ...]:
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


def _string(row: Mapping[str, object], key: str, where: _Line) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        where.fail(f"{key} must be a string that is not empty, got {value!r}", f'write "{key}": "..."')
    return value


def _answer(row: Mapping[str, object], where: _Line) -> str | None:
    given = [row[key] for key in ("reference_answer", "answer") if row.get(key) is not None]
    if len(given) > 1:
        where.fail("has both reference_answer and answer", "keep reference_answer")
    if not given:
        return None
    known = isinstance(given[0], str | int | float) and not isinstance(given[0], bool) and given[0] == given[0]  # NaN is none
    if not known or not str(given[0]).strip():
        where.fail(f"the reference answer must be a string or a number, got {given[0]!r}", 'write "reference_answer": "..."')
    return str(given[0])


def _id(value: object, where: _Line) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        where.fail(f"id must be a string or a number, got {value!r}", "give each prompt its own id, or none at all")
    return str(value)


def _content_id(text: str, messages: Sequence[Message]) -> str:
    content = json.dumps([text, [[message.role, message.content] for message in messages]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
