"""Prompts from JSONL files.

Each line is one JSON object in one of two forms:

    {"text": "I watched this film on a train and"}                        the model continues the text
    {"messages": [{"role": "user", "content": "What is 6 times 7?"}]}     the model answers, through its chat template

Optional keys of both: `id` (unique; derived from the content if absent, so that moving or adding lines changes no other prompt),
`reference_answer` or `answer` (for verifiers), `source` (for slices and mixtures; the file's name by default), `difficulty` (a number, more for
what is harder). Text must be raw: templates, special tokens and end markers are added here and nowhere else.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from onlinerl.config.paths import at_home
from onlinerl.errors import PromptError
from onlinerl.prompts._rows import Place, prompt
from onlinerl.protocols.prompts import PromptsConfig, Which
from onlinerl.types import RawPrompt

__all__ = ["Jsonl", "read_prompts"]

_KEYS = ("id", "text", "messages", "reference_answer", "answer", "source", "difficulty")
_MEANT = {
    "prompt": "text or messages",
    "question": "text, or messages for a chat model (and reference_answer for what an oracle verifies)",
}


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
        where = Place(f"{path}, line {number}", field)
        found = _parse(raw, where, source=file.name.removesuffix(".jsonl"))
        if found.id in lines_by_id:
            where.fail(
                f"has the same id as line {lines_by_id[found.id]}: {found.id!r}",
                "give each prompt its own id; without ids, the two lines hold the same prompt: remove one",
            )
        lines_by_id[found.id] = number
        prompts.append(found)
    if not prompts:
        raise PromptError(f"{path} holds no prompts", field=field, fix='write one per line, e.g. {"text": "Once upon a time"}')
    return prompts


_BINARY = (b"\x1f\x8b", b"PAR1")
"""How compressed files and Parquet begin."""
_OTHER_KIND = "write one JSON object per line; prompts.name=dataset reads CSV, Parquet and compressed files"


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


def _parse(raw: bytes, where: Place, source: str) -> RawPrompt:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        where.fail(f"is not UTF-8: {error}", _OTHER_KIND if raw.startswith(_BINARY) else "save the file as UTF-8")
    except json.JSONDecodeError as error:
        fix = "write one JSON object per line" if raw.lstrip().startswith(b"{") else _OTHER_KIND
        where.fail(f"is not JSON: {error.msg} at column {error.colno}", fix)
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
            other = "; prompts.name=dataset reads published forms, and any with prompts.columns"
            where.fail(f"has the unknown key {key!r}", f"{hint}known keys: {', '.join(_KEYS)}{other}")
    return prompt(row, where, source)
