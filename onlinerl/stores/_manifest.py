"""The manifest of an iteration: its finished phases, and the parts of its tables with their checksums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.stores import _files

_NAME = "manifest.json"


def read(folder: Path) -> dict[str, Any]:
    """What is recorded about an iteration.

    Raises:
        StoreError: if it is damaged.
    """
    path = folder / _NAME
    with way_back(folder):
        try:
            state = path.stat()
            found = _parsed(path, state.st_ino, state.st_mtime_ns, state.st_size)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _files.damaged(path, str(error)) from error
    return {**found, "phases": _as_now(found.get("phases", {}))}


@lru_cache(maxsize=64)
def _parsed(path: Path, *_state: int) -> Mapping[str, Any]:
    """A phase asks for the manifest dozens of times, and it changes a few times only. One that was replaced is another file, of another
    time."""
    found = _files.read_json(path)
    if not all(isinstance(found.get(key, {}), dict) for key in ("phases", "tables")):
        raise _files.damaged(path, "it is not the manifest of an iteration")
    return found


def update(folder: Path, **changes: Any) -> None:
    """Replace some entries, durably."""
    try:
        _files.replace_json(folder / _NAME, {**read(folder), **changes, "format": _files.FORMAT})
    finally:  # clocks of files are coarse, and numbers of files are used again
        _parsed.cache_clear()


def table(folder: Path, name: str) -> dict[str, Any] | None:
    """What is recorded about a table."""
    tables: dict[str, dict[str, Any]] = read(folder).get("tables", {})
    return tables.get(name)


def tables(folder: Path) -> set[str]:
    """The names of all tables, complete or not."""
    growing = {path.name.split(".")[0] for kind in ("*.journal", "*.jsonl") for path in folder.glob(kind)}
    return growing | set(read(folder).get("tables", {}))


def update_table(folder: Path, name: str, entry: Mapping[str, Any] | None) -> None:
    """Replace what is recorded about a table, durably."""
    tables = {**read(folder).get("tables", {}), name: entry}
    update(folder, tables={key: value for key, value in tables.items() if value is not None})


@contextlib.contextmanager
def way_back(folder: Path) -> Iterator[None]:
    """Say what can be done about a damaged file of an iteration."""
    try:
        yield
    except StoreError as error:
        if not folder.name.isdigit():  # the prompts of a run: no iteration makes them again
            raise
        raise StoreError(
            error.cause,
            field=error.field,
            fix=f"restore the file from a backup; or remove {folder.name} and all later numbers from iterations/, checkpoints/, "
            f"exports/, auxiliary/ and references/ in {folder.parent.parent}, then resume, and they are computed again",
        ) from error


def _as_now(phases: Mapping[str, Any]) -> dict[str, Any]:
    """The phases under their present names: up to format 2, `annotate` was a part of `train`, and one phase answered and measured."""
    now: dict[str, Any] = {}
    for name, record in phases.items():
        if name == "evaluate":
            now |= {"answer": {}, "measure": record}
        elif name == "train" and "annotate" not in phases and "checkpoint" in phases:
            now |= {"annotate": {}, "train": record}  # without a checkpoint it is trained again, and needs log-probs of its own
        else:
            now[name] = record
    return now
