"""What a configuration selects by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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
Seconds = Annotated[float, Field(gt=0, le=1e6)]
"""A deadline. Eleven days are longer than any wait should be, and short enough for every timer that is set to it."""


class Component(BaseModel):
    """Base of everything that a configuration selects by name: its fields are its knobs, an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    if not TYPE_CHECKING:  # type checkers know that fields are frozen, and which there are

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_"):
                what = "is a knob that only the configuration sets" if name in type(self).model_fields else "is no knob"
                raise ConfigError(
                    f"{type(self).__name__} sets `self.{name}`, which {what}",
                    field=f"{type(self).__name__}.{name}",
                    fix=f"keep state that is no knob private: `_{name}: Any = PrivateAttr(None)` in the class "
                    f"(from pydantic), set in `open` as `self._{name}`",
                )
            super().__setattr__(name, value)
