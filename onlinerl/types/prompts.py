"""What is asked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """A prompt as its source has it, checked but not yet seen by a tokenizer."""

    id: str
    text: str = ""
    """Plain text to continue; empty if there are messages."""
    messages: tuple[Message, ...] = ()
    """A conversation to answer; empty if there is text."""
    reference_answer: str | None = None
    source: str = ""
    difficulty: float | None = None
    place: str = field(default="", compare=False)
    """Where it is written, for messages, e.g. `train.jsonl, line 7`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, rendered and tokenised exactly once; nothing downstream tokenises it again."""

    id: str
    """Unique within its source."""
    text: str
    """What the model sees, as text (after the chat template, if one applies); without the goal, if it is told one."""
    token_ids: tuple[int, ...]
    """What the model sees, as tokens."""
    messages: tuple[Message, ...] = ()
    """The conversation, for oracles that apply their own template; empty for plain-text continuation."""
    reference_answer: str | None = None
    """The known right answer, for verifiers."""
    source: str = ""
    """Where it came from, for slices and mixtures."""
    difficulty: float | None = None
    """How hard the data say that it is: more is harder."""
    goal_ids: tuple[tuple[int, ...], ...] = ()
    """What the model sees with each goal, the lowest first, where it is trained on several; else empty. `token_ids` then has the highest."""
    answer_ids: tuple[int, ...] = ()
    """The reference answer as tokens that end with the end-of-sequence token, where it is trained on; else empty."""
