"""Durable writes and honest reads: the only place of the store that talks to the file system about bytes.

A file is replaced by writing a temporary one beside it, flushing it to the disk and renaming it, so a reader sees the old
content or the new one and never half of either. A journal is appended to with one write and one flush; what a crash leaves of an
unfinished write is a torn tail, which readers ignore and the next writer cuts off.

Everything carries a checksum, and a reader refuses what does not agree with its own:

- a JSON file ends with the SHA-256 of the bytes before it, and says in its `format` that it must have one;
- each frame of a journal has a CRC-32 (see `_journal`), and the manifest of an iteration has the SHA-256 of every Parquet part.

Files of format 1 have no checksums. They are still read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onlinerl.durable import append as append
from onlinerl.durable import damaged as damaged
from onlinerl.durable import disk_full as disk_full
from onlinerl.durable import explained as explained
from onlinerl.durable import is_full as is_full
from onlinerl.durable import sync_directory as sync_directory
from onlinerl.durable import write_all as write_all
from onlinerl.errors import StoreError

TEMPORARY = ".tmp"
_GIB = 1 << 30
FORMAT = 6
"""Of what is written; 1 had no checksums, up to 3 a table was one journal of JSON lines, or one Parquet file; up to 4 some keys of the
configuration had other names (`onlinerl.synonyms.RENAMED`), and up to 5 some columns (`_arrow`)."""
_CHECKSUM = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


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


def replace(path: Path, data: bytes) -> None:
    """Give `path` this content, all of it or none of it, and durably."""
    with explained(path):
        temporary = path.with_name(f".{path.name}{TEMPORARY}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_all(descriptor, [data])
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
    except NotADirectoryError as error:  # what was named as a folder is a file
        raise FileNotFoundError(*error.args) from error
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "it does not hold an object")
    stored = _CHECKSUM.search(data)
    if stored is None and value.get("format", 1) in range(2, FORMAT + 1):
        raise damaged(path, "its checksum is missing")
    if stored is not None and sha256(data[: stored.start()]) != stored[1].decode():
        raise damaged(path, "its content does not agree with its checksum")
    value.pop("sha256", None)
    return value


def require_free(path: Path, bytes_needed: int, min_free_bytes: int) -> None:
    """Refuse to write so much below an existing directory if that would leave less than `min_free_bytes` free.

    Raises:
        StoreError: with the numbers.
    """
    free = shutil.disk_usage(path).free
    if free - bytes_needed < min_free_bytes:
        raise StoreError(
            f"{path} has {free / _GIB:.2f} GiB free; {bytes_needed / _GIB:.2f} GiB are about to be written and "
            f"{min_free_bytes / _GIB:.2f} GiB must stay free",
            field="checkpoints.min_free_gib",
            fix="lower checkpoints.keep, set checkpoints.exports=last, free some space, or move the run to a larger disk "
            "(`runs`), then resume",
        )


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()
