"""What a prompt may say about the response that is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Goals:
    """How a prompt tells the model which score its response shall have: a whole number from 1 to `scale`."""

    scale: int
    text: str
    """With {goal} and {scale} where they go."""
    place: Literal["system", "user"] = "system"
    """In a system turn of a conversation, or before its last user turn. A text that is continued always begins with it."""

    def said(self, goal: int) -> str:
        """The words for one goal."""
        return self.text.replace("{goal}", str(goal)).replace("{scale}", str(self.scale))
