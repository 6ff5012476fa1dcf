"""Tables as formats 1 to 3 kept them: a journal of JSON lines while one grew, and one Parquet file when it was complete.

They are read whole; what is written today is in `_tables`. A line is the CRC-32 of a JSON object in eight hex digits, a space, and the
object; in format 1 it is the object alone. A column of a Parquet file that Arrow could not hold exactly is JSON text, and marked as such.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onlinerl.stores import _files
from onlinerl.stores._arrow import as_now

_ENCODING = b"onlinerl.encoding"
_ZEROS = bytes(8)
"""A power cut leaves whole blocks of zeros where data was to be; text has none."""


def journal_path(folder: Path, table: str) -> Path:
    """Where a growing table was kept."""
    return folder / f"{table}.jsonl"


def is_sealed(folder: Path, table: str) -> bool:
    """Whether there is such a table and it is complete."""
    return (folder / f"{table}.parquet").is_file()


def is_there(folder: Path, table: str) -> bool:
    """Whether there is such a table, complete or not."""
    return is_sealed(folder, table) or journal_path(folder, table).exists()


def rows(folder: Path, table: str, recorded: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """All rows of such a table under the present names of its columns, in the order in which they were appended; none if there is none.

    Args:
        folder: of the iteration.
        table: its name.
        recorded: size and checksum of a complete table; None in format 1.

    Raises:
        StoreError: if it is damaged.
    """
    # A crash between the rename and the removal of the journal left both: the Parquet file was complete, so it wins.
    if is_sealed(folder, table):
        found = _read_parquet(folder / f"{table}.parquet", recorded)
    else:
        journal = journal_path(folder, table)
        if recorded is not None and not journal.exists():
            raise _files.damaged(folder / f"{table}.parquet", "it was complete, and is gone")
        found = read_lines(journal)
    return [{as_now(column): cell for column, cell in row.items()} for row in found]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a journal, without a torn tail.

    Raises:
        StoreError: if anything is wrong that no crash of a writer can produce: a complete line that does not agree with its
            checksum, or a torn one that is not the last.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _files.damaged(path, str(error)) from error
    found: list[dict[str, Any]] = []
    position = 0
    torn = False
    for line in re.findall(rb"[^\n]*\n|[^\n]+\Z", data):  # not splitlines: a damaged byte may look like another line end
        row = None if _ZEROS in line else _parse(line)
        if row is not None and torn:
            raise _files.damaged(path, f"what comes before byte {position} is not a row")
        if row is None and _ZEROS not in line and (line.endswith(b"\n") or _parse(line[:-1] + b"\n") is not None):
            raise _files.damaged(path, f"the line at byte {position} does not agree with its checksum")
        position += len(line)
        if row is None:
            torn = True
        else:
            found.append(row)
    return found


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


def _read_parquet(path: Path, recorded: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        if recorded is not None and _files.sha256(data) != recorded["sha256"]:
            raise _files.damaged(path, "its content does not agree with its checksum")
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read()
        columns = {}
        for field in table.schema:
            values = table.column(field.name).to_pylist()
            if (field.metadata or {}).get(_ENCODING) == b"json":
                values = [json.loads(value) for value in values]
            columns[field.name] = values
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _files.damaged(path, str(error)) from error
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
