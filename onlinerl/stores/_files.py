"""Durable writes and honest reads: the only place of the store that talks to the file system about bytes.

A file is replaced by writing a temporary one beside it, flushing it to the disk and renaming it, so a reader sees the old
content or the new one and never half of either. A journal is appended to with one write and one flush; what a crash leaves of an
unfinished write is a torn tail, which readers ignore and the next writer cuts off.

Everything carries a checksum, and a reader refuses what does not agree with its own:

- a JSON file ends with the SHA-256 of the bytes before it, and says in its `format` that it must have one;
- a line of a journal is the CRC-32 of a JSON object in eight hex digits, a space, and the object.

Files of format 1 have no checksums. They are still read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onlinerl.errors import StoreError

TEMPORARY = ".tmp"
FORMAT = 3
"""Of what is written; 1 had no checksums."""
_CHECKSUM = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')
_ZEROS = bytes(8)
"""A power cut leaves whole blocks of zeros where data was to be; text has none."""
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
    text = json.dumps(finite({"format": FORMAT, **value}), indent=2, allow_nan=False)
    body = text.removesuffix("\n}").encode()
    replace(path, body + f',\n  "sha256": "{sha256(body)}"\n}}\n'.encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its checksum.

    Raises:
        StoreError: if the file is damaged or cannot be read; FileNotFoundError is left to the caller.
    """
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "it does not hold an object")
    stored = _CHECKSUM.search(data)
    if stored is None and value.get("format") == FORMAT:
        raise damaged(path, "its checksum is missing")
    if stored is not None and sha256(data[: stored.start()]) != stored[1].decode():
        raise damaged(path, "its content does not agree with its checksum")
    value.pop("sha256", None)
    return value


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a journal; they are on the disk when this returns, and not in the file if it raises.

    The journal must end with a complete line: see `cut_torn_tail`.
    """
    data = b"".join(_line(row) for row in rows)
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
        StoreError: if anything is wrong that no crash of a writer can produce: a complete line that does not agree with its
            checksum, or a torn one that is not the last.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise damaged(path, str(error)) from error
    rows: list[dict[str, Any]] = []
    good = position = 0
    torn = False
    for line in re.findall(rb"[^\n]*\n|[^\n]+\Z", data):  # not splitlines: a damaged byte may look like another line end
        row = None if _ZEROS in line else _parse(line)
        if row is not None and torn:
            raise damaged(path, f"what comes before byte {position} is not a row")
        if row is None and _ZEROS not in line and (line.endswith(b"\n") or _parse(line[:-1] + b"\n") is not None):
            raise damaged(path, f"the line at byte {position} does not agree with its checksum")
        position += len(line)
        if row is None:
            torn = True
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


def _line(row: Mapping[str, Any]) -> bytes:
    body = json.dumps(row, default=plain, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row in a complete line; None if the line is not complete or not what was written."""
    if not line.endswith(b"\n"):
        return None
    body = line[:-1]
    if not body.startswith(b"{"):  # as it does in format 1, which has no checksum
        checksum, _, body = body.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            return None
    try:
        row = json.loads(body)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def damaged(
    path: Path, why: str, fix: str = "restore the file from a backup, or set the run aside and start it afresh"
) -> StoreError:
    """The error for a file that cannot be trusted."""
    return StoreError(f"{path} is damaged or cannot be read: {why}", field="runs", fix=fix)
