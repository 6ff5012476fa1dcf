"""The loss of one pair that another algorithm is made of."""

from __future__ import annotations

from functools import cache

from onlinerl.algorithms._margin import Margin
from onlinerl.ops.whole_step import WholeStep
from onlinerl.protocols.algorithm import Algorithm


@cache
def base_loss(name: str) -> Margin:
    """The loss of that name, with its defaults.

    Raises:
        ConfigError: if it is none of a margin, or has no `phi` of its own.
    """
    from onlinerl import registry
    from onlinerl.errors import ConfigError

    found = registry.load("algorithms", name, Algorithm, field="algorithm.base")
    if issubclass(found, WholeStep) or not issubclass(found, Margin):
        cause, fix = "is no loss of the margin of one pair", "choose one that is, e.g. dpo, ipo or slic"
    elif "phi" not in vars(found):
        cause = f"is {found.__bases__[0].__name__} with other knobs, and of a base they are not read"
        fix = "choose the loss that it is a preset of, and set its knobs as this algorithm's own"
    else:
        return found()
    raise ConfigError(f"{name} {cause}", field="algorithm.base", fix=fix)
