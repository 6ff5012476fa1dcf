"""One table of one iteration: a journal while it grows, one Parquet file when it is complete.

Reading gives the same rows before and after sealing. A column that Parquet can hold exactly is stored natively, so that any tool
can read it; one that it cannot (numbers of mixed types, mappings with varying keys) is stored as JSON text and marked as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onlinerl.errors import StoreError
from onlinerl.stores import _files

_ENCODING = b"onlinerl.encoding"


def journal_path(folder: Path, table: str) -> Path:
    """Where a growing table is kept."""
    return folder / f"{table}.jsonl"


def sealed_path(folder: Path, table: str) -> Path:
    """Where a complete table is kept."""
    return folder / f"{table}.parquet"


def read(folder: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table, in the order in which they were appended; a key that a row lacks is None.

    Raises:
        StoreError: if the table is damaged.
    """
    sealed = sealed_path(folder, table)
    # A crash between the rename and the removal of the journal leaves both: the Parquet file is complete, so it wins.
    return _read_parquet(sealed) if sealed.exists() else _aligned(_files.read_lines(journal_path(folder, table))[0])


def seal(folder: Path, table: str) -> None:
    """Turn the journal into a Parquet file; nothing happens if it already is one."""
    journal = journal_path(folder, table)
    if not sealed_path(folder, table).exists():
        write(folder, table, read(folder, table))
    with _files.explained(journal):
        journal.unlink(missing_ok=True)


def write(folder: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A complete table at once, in place of an older one."""
    sink = pa.BufferOutputStream()
    pq.write_table(_to_arrow(rows), sink, compression="zstd")
    _files.replace(sealed_path(folder, table), sink.getvalue().to_pybytes())


def _aligned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _to_arrow(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    arrays, fields = [], []
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        array = _native(values)
        if array is None:
            array = pa.array([json.dumps(value) for value in values], pa.string())
            fields.append(pa.field(name, pa.string(), metadata={_ENCODING: b"json"}))
        else:
            fields.append(pa.field(name, array.type))
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _native(values: list[Any]) -> pa.Array | None:
    """The values as Arrow guesses them, if that loses nothing."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None
    # Comparing texts tells 1 from 1.0 and from true, and NaN equals itself.
    return array if _writable(array.type) and json.dumps(array.to_pylist()) == json.dumps(values) else None


def _writable(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Parquet has no struct without fields
        return kind.num_fields > 0 and all(_writable(kind.field(i).type) for i in range(kind.num_fields))
    return _writable(kind.value_type) if pa.types.is_list(kind) else True


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} is damaged or cannot be read: {error}",
            field="runs",
            fix="restore the file from a backup, or set the run aside and start it afresh",
        ) from error
    columns = {}
    for field in table.schema:
        values = table.column(field.name).to_pylist()
        if (field.metadata or {}).get(_ENCODING) == b"json":
            values = [json.loads(value) for value in values]
        columns[field.name] = values
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
