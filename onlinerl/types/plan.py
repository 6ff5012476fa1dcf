"""What an algorithm is told of a run before it starts, and what it may say to that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What an algorithm is told of a run before it starts."""

    iterations: int
    references: tuple[int | Literal["ema"] | None, ...]
    """Which iterate is the reference in each iteration: 0 is the base model, `ema` an average of several, None no reference."""
    max_lag: int = 0
    """How many versions the policy that samples may be behind the one that training starts from."""
    max_new_tokens: int | None = None
    """The longest response that is sampled."""
    samples_per_prompt: int | None = None
    """Those that are drawn from the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objection:
    """Why an algorithm cannot be run as planned."""

    field: str
    cause: str
    fix: str
