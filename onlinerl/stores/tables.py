"""Typed tables: what the files of a table hold, as values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Generic, TypeVar

from onlinerl.stores._tables import TableFiles
from onlinerl.stores.rows import Codec

T = TypeVar("T")
_AT_ONCE = 32
"""Rows that are looked up together."""


class StoredTable(Generic[T]):
    """A Table (see the protocol) in the run directory."""

    def __init__(self, files: TableFiles, codec: Codec[T]) -> None:
        self._files, self._codec = files, codec

    @property
    def sealed(self) -> bool:
        """True once the table is complete."""
        return self._files.sealed

    def append(self, values: Sequence[T]) -> None:
        """Durable when it returns; if it raises, none of the values is in the table."""
        self._files.append([self._codec.to_row(value) for value in values])

    def __iter__(self) -> Iterator[T]:
        """All values, in the order of `append`; no more than one part is in memory at a time."""
        for rows in self._files.chunks():
            yield from map(self._codec.from_row, rows)

    def select(self, prompt_ids: Iterable[str]) -> Iterator[T | None]:
        """The latest value of each prompt, None where there is none."""
        asked = iter(prompt_ids)
        while some := list(islice(asked, _AT_ONCE)):
            for row in self._files.rows(some):
                yield None if row is None else self._codec.from_row(row)

    def missing(self, prompt_ids: Iterable[str]) -> list[str]:
        """Prompts of which there is nothing, in the same order."""
        there = self._files.ids()
        return [prompt_id for prompt_id in prompt_ids if prompt_id not in there]

    def seal(self) -> None:
        """The table is complete. May be called again."""
        self._files.seal()

    def clear(self) -> None:
        """Begin again: what a killed process left is removed."""
        self._files.clear()
