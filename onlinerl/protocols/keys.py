"""Keys that several roles have: their types, and what holds for their values."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from onlinerl.errors import ConfigError


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in ("CPU", "GPU"):  # would take the place of what the run reserves for itself
            raise ValueError(f"{name} is no custom resource; the key `cpus` and the layout say how many there are")
        if amount < 0:
            raise ValueError(f"{name} cannot be negative")
    return resources


CustomResources = Annotated[dict[str, float], AfterValidator(_custom)]
"""Amounts of Ray's custom resources, by name."""
T = TypeVar("T")


class MayChange:
    """Marks a key that a resume may change."""


Resumable = Annotated[T, MayChange()]
"""A key of this type may differ between a run and its resume: where it runs, what is watched and when to stop, not what is computed."""
Seconds = Annotated[float, Field(gt=0, le=1e6)]
"""A deadline. Eleven days are longer than any wait should be, and short enough for every timer that is set to it."""


def decided(dtype: str, key: str) -> str:
    """The dtype, if it is one.

    Args:
        dtype: what the key says.
        key: its dotted name.

    Raises:
        ConfigError: if it is `auto`. Whoever computes must not decide for itself: a run is resumed with what it was started with.
    """
    if dtype == "auto":
        raise ConfigError(
            "is auto, and nothing has decided yet what that is; a run does it when it starts",
            field=key,
            fix="name a dtype, float32 or bfloat16, or settle the whole configuration with onlinerl.config.settled",
        )
    return dtype
