"""The phases of an iteration: one file each, a function of the iteration that returns what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from onlinerl.controller.iteration import Iteration
from onlinerl.graph import Phase


def function(graph: Sequence[Phase], name: str) -> Callable[[Iteration], dict[str, Any]]:
    """What a phase does: `NAME` in the module NAME of this package, unless its row of the graph says otherwise."""
    (row,) = (phase for phase in graph if phase.name == name)
    module, _, attribute = (row.function or f"{__name__}.{name}:{name}").partition(":")
    found: Callable[[Iteration], dict[str, Any]] = getattr(import_module(module), attribute)
    return found
