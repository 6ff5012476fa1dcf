"""The role of prompt sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, Self

from pydantic import Field

from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import Resumable
from onlinerl.types import Prompt, RawPrompt

Which = Literal["train", "heldout"]


class PromptSource(Protocol):
    """Prompts with an explicit cursor: the same cursor gives the same prompts."""

    def take(self, count: int, cursor: int) -> tuple[list[Prompt], int]:
        """`count` prompts from `cursor` on, and the next cursor."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Prompt]:
        """All of them, in an order of no meaning."""
        ...


class PromptsConfig(Component):
    """Where prompts come from, as it is configured: which are trained on and which are held out."""

    name: str = ""
    train: str
    """Path of a JSONL file, or `package:NAME` for one that ships with onlinerl; another source says what it means there."""
    heldout: str
    """Prompts for evaluation; must not overlap with `train`."""
    per_iteration: int = Field(64, ge=1)
    """Fresh prompts taken in each iteration."""
    max_tokens: int = Field(512, ge=1)
    """Longest prompt accepted; longer ones are an error that counts them."""
    filter_overlong_prompts: bool = False
    """Leave longer ones out instead, and say how many they are."""
    reuse: Resumable[bool] = False
    """Start over when the prompts run out; otherwise asking for more than there are is an error."""

    def raw(self, which: Which) -> Sequence[RawPrompt]:
        """All prompts of one kind, with unique ids, in an order of no meaning.

        Raises:
            PromptError: naming the place of what is wrong.
        """
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """What is worth saying of how `raw` has read them, once it has."""
        return []

    def located(self) -> Self:
        """The same, so that it means the same in every working directory."""
        return self
