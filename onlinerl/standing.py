"""What stays up from one run to the next: the cluster, and the engine where the next run asks for the same one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Slot(Generic[T]):
    """One thing that is open, and what it was opened for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: tuple[Any, T] | None = None

    def take(self, purpose: Any, opened: Callable[[], AbstractContextManager[T]]) -> tuple[T, bool]:
        """What is open for an equal purpose, or else a new one in its place; and whether it was open already."""
        if self._open is not None and self._open[0] == purpose:
            return self._open[1], True
        self.close()
        value = self._stack.enter_context(opened())
        self._open = purpose, value
        return value, False

    def close(self) -> None:
        """End it. May be called again."""
        self._open = None
        self._stack.close()


class Standing:
    """The parts that may stay up between runs. A context manager: at its end nothing is left.

    A run that fails or is stopped leaves nothing to the next one.
    """

    def __init__(self) -> None:
        self.cluster: Slot[Any] = Slot()
        self.engine: Slot[Any] = Slot()

    def close(self) -> None:
        """End everything; the engine before the cluster that it runs on."""
        try:
            self.engine.close()
        finally:
            self.cluster.close()

    def __enter__(self) -> Standing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
