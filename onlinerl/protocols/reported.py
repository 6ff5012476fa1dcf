"""What an algorithm or an objective reports of itself."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Reported(NamedTuple):
    """A metric that few algorithms have, from `loss` at each optimizer step or from `figures` for each iteration."""

    name: str
    help: str
    unit: str
    origin: Literal["step", "iteration"] = "step"
