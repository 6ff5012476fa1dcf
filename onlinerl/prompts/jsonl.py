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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from onlinerl.config import PromptsConfig
from onlinerl.errors import PromptError
from onlinerl.types import Message, Prompt, derive_seed

__all__ = ["JsonlPrompts", "check_answers", "check_overlap", "load_prompts", "read_prompts", "render"]

_KEYS = ("id", "text", "messages", "reference_answer", "answer", "source")

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


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """One line of a prompt file, checked but not yet seen by a tokenizer."""

    id: str
    text: str = ""
    """Plain text to continue; empty if there are messages."""
    messages: tuple[Message, ...] = ()
    """A conversation to answer; empty if there is text."""
    reference_answer: str | None = None
    source: str = ""


def load_prompts(
    config: PromptsConfig, tokenizer: Any, seed: int, *, needs_answers: bool = False
) -> tuple[JsonlPrompts, list[Prompt]]:
    """All that a run needs: the source of training prompts, and the held-out prompts in the order of their file.

    Args:
        config: the `prompts` section.
        tokenizer: the policy's Hugging Face tokenizer.
        seed: the run's seed; it decides the order of the training prompts.
        needs_answers: whether the oracle needs reference answers.

    Raises:
        PromptError: for everything that is wrong with either file, before anything expensive starts.
    """
    train, heldout = read_prompts(config.train, "prompts.train"), read_prompts(config.heldout, "prompts.heldout")
    check_overlap(train, heldout)
    if needs_answers:
        check_answers(train, "prompts.train")
        check_answers(heldout, "prompts.heldout")
    rendered = render(train, tokenizer, config.max_tokens, "prompts.train")
    source = JsonlPrompts(rendered, seed=seed, reuse=config.reuse)
    return source, render(heldout, tokenizer, config.max_tokens, "prompts.heldout")


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


def render(raw: Sequence[RawPrompt], tokenizer: Any, max_tokens: int, field: str = "prompts.train") -> list[Prompt]:
    """Apply the chat template where there are messages and tokenise, once and for all.

    Args:
        raw: what `read_prompts` returned.
        tokenizer: the policy's tokenizer, with the interface of Hugging Face tokenizers.
        max_tokens: longest prompt accepted, in tokens.
        field: the configuration key that named the file, for messages.

    Raises:
        PromptError: if there is no chat template for messages, special tokens are doubled or misplaced, or prompts are too
            long (none is cut or left out silently).
    """
    prompts = [_render(prompt, tokenizer, field) for prompt in raw]
    long = [prompt for prompt in prompts if len(prompt.token_ids) > max_tokens]
    if long:
        longest = max(long, key=lambda prompt: len(prompt.token_ids))
        raise PromptError(
            f"{len(long)} of {len(prompts)} prompts are longer than {max_tokens} tokens; the longest, {longest.id!r}, has "
            f"{len(longest.token_ids)}",
            field=field,
            fix=f"set prompts.max_tokens to {len(longest.token_ids)} or more, or shorten or remove these prompts",
        )
    return prompts


def check_overlap(train: Sequence[RawPrompt], heldout: Sequence[RawPrompt]) -> None:
    """Held-out prompts must not be trained on: compare what is asked, whatever the ids, case and spacing.

    Raises:
        PromptError: counting the prompts in both, and showing one.
    """
    trained = {_normal(prompt): prompt for prompt in train}
    shared = [(trained[_normal(prompt)], prompt) for prompt in heldout if _normal(prompt) in trained]
    if shared:
        first, second = shared[0]
        raise PromptError(
            f"{len(shared)} of {len(heldout)} held-out prompts are also training prompts, e.g. {second.id!r}, which is "
            f"{first.id!r} in prompts.train",
            field="prompts.heldout",
            fix="remove them from one of the two files",
        )


def check_answers(prompts: Sequence[RawPrompt], field: str = "prompts.train") -> None:
    """Every prompt must carry a reference answer; call it if the oracle needs them.

    Raises:
        PromptError: counting the prompts without, and naming one.
    """
    missing = [prompt.id for prompt in prompts if prompt.reference_answer is None]
    if missing:
        raise PromptError(
            f"{len(missing)} of {len(prompts)} prompts have no reference answer, which the oracle needs; the first is {missing[0]!r}",
            field=field,
            fix='add "reference_answer": "..." to each line, or choose another oracle',
        )


class JsonlPrompts:
    """A prompt source with an explicit cursor: the same cursor always gives the same prompts.

    Prompts are ordered by a hash of (seed, pass, id), so adding or removing some never changes the order of the others.

    Args:
        prompts: rendered prompts with unique ids.
        seed: the run's seed.
        reuse: start over, in a new order, when they run out.
        field: the configuration key that named the file, for messages.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, reuse: bool = False, field: str = "prompts.train") -> None:
        self._prompts, self._seed, self._reuse, self._field = tuple(prompts), seed, reuse, field
        self._ordered: dict[int, list[Prompt]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def take(self, count: int, cursor: int) -> tuple[list[Prompt], int]:
        """`count` different prompts from `cursor` on, and the next cursor.

        The cursor counts prompts over all passes, starting at 0. Where a call reaches into the next pass, prompts that it already
        holds are skipped there: twice the same prompt in one iteration would draw the same seeds.

        Raises:
            PromptError: if there are not enough prompts (left).
        """
        size = len(self._prompts)
        if count > size:
            raise PromptError(
                f"{count} prompts are wanted at once, but there are {size}",
                field=self._field,
                fix=f"add prompts, or lower prompts.per_iteration to {size}",
            )
        if not self._reuse and cursor + count > size:
            raise PromptError(
                f"{count} more prompts are wanted, but {max(size - cursor, 0)} of {size} are left",
                field=self._field,
                fix="add prompts, lower iterations or prompts.per_iteration, or set prompts.reuse to true to start over",
            )
        taken: dict[str, Prompt] = {}
        while len(taken) < count:
            prompt = self._order(cursor // size)[cursor % size]
            taken.setdefault(prompt.id, prompt)
            cursor += 1
        return list(taken.values()), cursor

    def _order(self, epoch: int) -> list[Prompt]:
        if epoch not in self._ordered:
            key = {prompt.id: (derive_seed(self._seed, epoch, prompt.id), prompt.id) for prompt in self._prompts}
            self._ordered[epoch] = sorted(self._prompts, key=lambda prompt: key[prompt.id])
        return self._ordered[epoch]


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
            close = {"prompt": ["text", "messages"], "question": ["text"]}.get(key) or get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
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


def _normal(prompt: RawPrompt) -> str:
    words = [prompt.text, *(f"{message.role} {message.content}" for message in prompt.messages)]
    return " ".join("\n".join(words).lower().split())


def _render(prompt: RawPrompt, tokenizer: Any, field: str) -> Prompt:
    if prompt.messages:
        text = _apply_template(prompt, tokenizer, field)
        # The template has written all special tokens that belong there.
        token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        text = prompt.text
        token_ids = tuple(tokenizer(text, add_special_tokens=True)["input_ids"])
    if not token_ids:
        raise PromptError(
            f"the tokenizer makes nothing of prompt {prompt.id!r}: {text!r} has no tokens",
            field=field,
            fix="remove it, or give text that the model can read",
        )
    _check_special_tokens(prompt, token_ids, tokenizer, field)
    return Prompt(
        id=prompt.id,
        text=text,
        token_ids=token_ids,
        messages=prompt.messages,
        reference_answer=prompt.reference_answer,
        source=prompt.source,
    )


def _apply_template(prompt: RawPrompt, tokenizer: Any, field: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"prompt {prompt.id!r} is a conversation, but the model's tokenizer has no chat template",
            field=field,
            fix="use an instruction-tuned model, or give prompts as text for plain continuation",
        )
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs that raise what they like, e.g. on a role they do not know
        raise PromptError(
            f"the model's chat template rejects prompt {prompt.id!r}: {error}",
            field=field,
            fix="use roles and turns that the model knows (some know no system message), or another model",
        ) from error


def _check_special_tokens(prompt: RawPrompt, token_ids: tuple[int, ...], tokenizer: Any, field: str) -> None:
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    if bos is not None and token_ids[:2] == (bos, bos):
        raise PromptError(
            f"prompt {prompt.id!r} starts with two beginning-of-sequence tokens",
            field=field,
            fix="remove one from the tokenizer's chat template or post-processor",
        )
    if not prompt.messages and eos is not None and len(token_ids) > 1 and token_ids[-1] == eos:
        raise PromptError(
            f"the tokenizer ends prompt {prompt.id!r} with its end-of-sequence token, so there is nothing to continue",
            field=field,
            fix="switch that off in the tokenizer (add_eos_token: false)",
        )
