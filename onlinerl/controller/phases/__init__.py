"""The phases of an iteration: one file each, a function of the iteration that returns what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from onlinerl.controller.iteration import Iteration
from onlinerl.graph import Phase
from onlinerl.types import PhaseRecord


def function(graph: Sequence[Phase], name: str) -> Callable[[Iteration], PhaseRecord]:
    """What a phase does: `NAME` in the module NAME of this package, unless its row of the graph says otherwise."""
    (row,) = (phase for phase in graph if phase.name == name)
    module, _, attribute = (row.function or f"{__name__}.{name}:{name}").partition(":")
    found: Callable[[Iteration], PhaseRecord] = getattr(import_module(module), attribute)
    return found
