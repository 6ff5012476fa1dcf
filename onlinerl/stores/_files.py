"""Durable writes and honest reads: the only place of the store that talks to the file system about bytes.

A file is replaced by writing a temporary one beside it, flushing it to the disk and renaming it, so a reader sees the old
content or the new one and never half of either. A journal is appended to with one write and one flush; what a crash leaves of an
unfinished write is a torn tail, which readers ignore and the next writer cuts off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onlinerl.errors import StoreError

TEMPORARY = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def plain(value: Any) -> Any:
    """What `json` cannot encode by itself: numpy arrays and numbers."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a row may hold numbers, strings, lists, mappings and arrays, not {type(value).__name__}")


def finite(value: Any) -> Any:
    """The same value with every number that JSON does not know (NaN, infinities) replaced by None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def is_full(error: OSError) -> bool:
    """True if the error means that the disk or a quota is full."""
    return error.errno in _FULL


def disk_full(path: Path) -> StoreError:
    """The error for a full disk."""
    return StoreError(
        f"the disk is full while writing {path}; everything that was finished before is safe and readable",
        field="runs",
        fix="free some space (checkpoints.keep and checkpoints.exports say how much a run keeps), then resume: the run "
        "continues at the first unfinished phase",
    )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write below `path` into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from error
        if error.errno in _FORBIDDEN:
            raise StoreError(
                f"{path} cannot be written: {error.strerror}",
                field="runs",
                fix="give write permission, or set `runs` to a directory that you may write to",
            ) from error
        raise StoreError(
            f"{path} cannot be written: {error}", field="runs", fix="check the disk and the path, then resume the run"
        ) from error


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte and wait until the disk has them."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Give `path` this content, all of it or none of it, and durably."""
    with explained(path):
        temporary = path.with_name(f".{path.name}{TEMPORARY}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(descriptor, data)
            finally:
                os.close(descriptor)
            temporary.rename(path)
            sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Give `path` this content as JSON that every reader accepts: numbers that are not finite become null."""
    replace(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StoreError: if the file is damaged or cannot be read; FileNotFoundError is left to the caller.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it does not hold an object")
    return value


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a journal; they are on the disk when this returns, and not in the file if it raises.

    The journal must end with a complete line: see `cut_torn_tail`.
    """
    data = "".join(json.dumps(row, default=plain, separators=(",", ":")) + "\n" for row in rows).encode("ascii")
    with explained(path):
        fresh = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data)
            except OSError:
                # Otherwise a caller that tries again would find its rows twice.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if fresh:
            sync_directory(path.parent)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete rows of a journal and how many bytes they take; a torn tail is not counted.

    Raises:
        StoreError: if a damaged line is followed by a good one, which no crash of a writer can produce.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise _damaged(path, str(error)) from error
    rows: list[dict[str, Any]] = []
    good = position = 0
    torn = False
    for line in data.splitlines(keepends=True):
        position += len(line)
        row = _parse(line) if line.endswith(b"\n") else None
        if row is None:
            torn = True
        elif torn:
            raise _damaged(path, f"the line before byte {position - len(line)} is not valid")
        else:
            rows.append(row)
            good = position
    return rows, good


def cut_torn_tail(path: Path) -> None:
    """Remove what a crash left of an unfinished write."""
    good = read_lines(path)[1]
    if path.exists() and path.stat().st_size > good:
        with explained(path):
            os.truncate(path, good)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path} is damaged or cannot be read: {why}",
        field="runs",
        fix="restore the file from a backup, or set the run aside and start it afresh",
    )
