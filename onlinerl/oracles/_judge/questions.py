"""What a judge is asked, what came of it, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from onlinerl.oracles._judge.endpoint import Reply
from onlinerl.oracles._judge.reading import Form
from onlinerl.types import Cost


class Price(BaseModel):
    """Dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    input: float = Field(0.0, ge=0)
    output: float = Field(0.0, ge=0)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request."""

    text: str
    form: Form
    seed: int
    read: Callable[[Reply], tuple[tuple[float, ...], float | None, str] | None]
    """What a reply says: numbers, log-odds where there are any, a rationale; None if it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What came of one request."""

    status: str
    values: tuple[float, ...] = ()
    log_odds: float | None = None
    words: str = ""
    cost: Cost = field(default_factory=Cost)
    key: str = ""
