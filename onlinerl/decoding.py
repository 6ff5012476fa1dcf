"""The text of tokens that follow others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def continuation(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What `tokens` say after `before`: tokenizers leave out the space before a text, which here stands between the two.

    Args:
        tokenizer: with the interface of Hugging Face tokenizers.
        before: a prompt, whole.
        tokens: of a response.
    """

    def text(ids: Sequence[int]) -> str:
        decoded: str = tokenizer.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded

    start, whole = text(before), text([*before, *tokens])
    return whole[len(start) :] if whole.startswith(start) else text(tokens)
