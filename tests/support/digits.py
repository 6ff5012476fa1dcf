"""A tokenizer whose numbers are digits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def count_in_digits(model: Path, words: Sequence[str]) -> None:
    """Give the words from one on of a model's tokenizer other names: 1, 2, ..."""
    file = model / "tokenizer.json"
    core = json.loads(file.read_text())
    digits = {word: str(n) for n, word in enumerate(words, start=1)}
    core["model"]["vocab"] = {digits.get(word, word): i for word, i in core["model"]["vocab"].items()}
    file.write_text(json.dumps(core))
