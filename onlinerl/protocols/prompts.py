"""The role of prompt sources."""

from __future__ import annotations

from typing import Protocol

from onlinerl.types import Prompt


class PromptSource(Protocol):
    """Prompts with an explicit cursor: the same cursor gives the same prompts."""

    def take(self, count: int, cursor: int) -> tuple[list[Prompt], int]:
        """`count` prompts from `cursor` on, and the next cursor."""
        ...

    def __len__(self) -> int: ...
