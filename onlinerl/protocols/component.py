"""What a configuration selects by name."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Component(BaseModel):
    """Base of everything that a configuration selects by name: its fields are its knobs, an unknown one is an error."""

    chosen_by: ClassVar[str] = "name"
    """The key of its section that selects it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
