"""The role of stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["checkpoints", "exports"]
"""What an iteration keeps beside its tables."""


class Store(Protocol):
    """The run directory: everything that resume needs. Only the controller writes to it."""

    def append(self, iteration: int, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Durable when it returns."""
        ...

    def read(self, iteration: int, table: str) -> list[dict[str, Any]]:
        """All rows, in the order of `append`."""
        ...

    def sealed(self, iteration: int, table: str) -> bool:
        """True once the table is complete."""
        ...

    def seal(self, iteration: int, table: str) -> None:
        """The table is complete: turn its journal into one Parquet file."""
        ...

    def write(self, iteration: int, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make `rows` the complete table, all of them or none."""
        ...

    def finish_phase(self, iteration: int, phase: str, record: Mapping[str, Any]) -> None:
        """Mark a phase of an iteration as done, with what later phases and `show` need to know about it."""
        ...

    def phases(self, iteration: int) -> dict[str, dict[str, Any]]:
        """Finished phases of an iteration and their records, in the order in which they finished."""
        ...

    def staged(self, kind: Kind, iteration: int) -> AbstractContextManager[Path]:
        """A directory that becomes the artefact when the block ends."""
        ...

    def require_files(self, path: Path, written: Mapping[str, int]) -> None:
        """Refuse a staged artefact that lacks anything of what was written to it."""
        ...

    def require(self, kind: Kind, iteration: int) -> Path:
        """The complete artefact of an iteration, every byte of it verified."""
        ...

    def retain(self, kind: Kind, keep: set[int]) -> None:
        """Remove those of all other iterations."""
        ...

    def require_free(self, bytes_needed: int, min_free_bytes: int) -> None:
        """Refuse to write what would leave less than this free."""
        ...
