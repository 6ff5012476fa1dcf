"""Pairs of which it is known which response is better, as JSON lines, for oracles that are fitted or checked on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlinerl.config.paths import at_home
from onlinerl.errors import OracleError
from onlinerl.types import Message, Prompt


@dataclass(frozen=True, kw_only=True)
class KnownPair:
    """Two responses to a prompt."""

    prompt: Prompt
    chosen: str
    rejected: str
    prob: float
    """How probable it is that the chosen one is better."""


def located(path: str, field: str, folders: Sequence[Path]) -> str:
    """The absolute path of a file of pairs, where it is in one of the folders; `path` if it is in none."""
    places = [folder.absolute() / at_home(path, field) for folder in folders]
    return str(next((place for place in places if place.is_file()), path))


def read(path: str, field: str) -> tuple[list[KnownPair], str]:
    """The pairs of a file, and the SHA-256 of what it holds.

    Args:
        path: of JSON lines with `prompt` (a text, or messages), `chosen`, `rejected`, perhaps `p` and `reference_answer`.
        field: the key that names it, e.g. `oracle.data`.

    Raises:
        OracleError: if it cannot be read, or a line is no pair.
    """
    try:
        content = at_home(path, field).read_bytes()
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        return [_pair(row, number) for number, row in enumerate(rows)], hashlib.sha256(content).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OracleError(
            f"{path} holds no pairs: {type(error).__name__} {error}",
            field=field,
            fix='give a file with one {"prompt": ..., "chosen": ..., "rejected": ...} per line',
        ) from None


def _pair(row: Mapping[str, Any], number: int) -> KnownPair:
    said, chosen, rejected, prob = row["prompt"], row["chosen"], row["rejected"], float(row.get("p", 1.0))
    if not (isinstance(chosen, str) and isinstance(rejected, str) and 0 <= prob <= 1):
        raise ValueError("`chosen` and `rejected` are texts, and `p` a probability")
    messages = () if isinstance(said, str) else tuple(Message(role=each["role"], content=each["content"]) for each in said)
    prompt = Prompt(
        id=f"anchor-{number}",
        text=said if isinstance(said, str) else "\n".join(each.content for each in messages),
        token_ids=(),
        messages=messages,
        reference_answer=row.get("reference_answer"),
    )
    return KnownPair(prompt=prompt, chosen=chosen, rejected=rejected, prob=prob)
