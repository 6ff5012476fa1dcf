"""One table of one iteration: a journal while it grows, one Parquet file when it is complete.

Reading gives the same rows before and after sealing. A column that Parquet can hold exactly is stored natively, so that any tool
can read it; one that it cannot (numbers of mixed types, mappings with varying keys) is stored as JSON text and marked as such.

The manifest of the iteration holds size and SHA-256 of every complete table, recorded before the file appears under its name: Parquet's
own page checksums, written too, do not cover its metadata.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onlinerl.errors import StoreError
from onlinerl.stores import _files

_ENCODING = b"onlinerl.encoding"
_MANIFEST = "manifest.json"


def journal_path(folder: Path, table: str) -> Path:
    """Where a growing table is kept."""
    return folder / f"{table}.jsonl"


def sealed_path(folder: Path, table: str) -> Path:
    """Where a complete table is kept."""
    return folder / f"{table}.parquet"


def manifest(folder: Path) -> dict[str, Any]:
    """What is recorded about an iteration: its finished phases and complete tables.

    Raises:
        StoreError: if it is damaged.
    """
    path = folder / _MANIFEST
    with _way_back(folder):
        try:
            found = _files.read_json(path)
        except FileNotFoundError:
            return {}
        if not all(isinstance(found.get(key, {}), dict) for key in ("phases", "tables")):
            raise _files.damaged(path, "it is not the manifest of an iteration")
    return {**found, "phases": _as_now(found.get("phases", {}))}


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


def update_manifest(folder: Path, **changes: Any) -> None:
    """Replace some entries of an iteration's manifest, durably."""
    _files.replace_json(folder / _MANIFEST, {**manifest(folder), **changes})


def read(folder: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table, in the order in which they were appended; a key that a row lacks is None.

    Raises:
        StoreError: if the table is damaged, or complete and no longer there.
    """
    journal, sealed = journal_path(folder, table), sealed_path(folder, table)
    recorded = manifest(folder).get("tables", {}).get(table)
    with _way_back(folder):
        # A crash between the rename and the removal of the journal leaves both: the Parquet file is complete, so it wins.
        if sealed.exists():
            return _read_parquet(sealed, recorded)
        if recorded is not None and not journal.exists():
            raise _files.damaged(sealed, "it was complete, and is gone")
        return _aligned(_files.read_lines(journal)[0])


@contextlib.contextmanager
def _way_back(folder: Path) -> Iterator[None]:
    """Say what can be done about a damaged file of an iteration."""
    try:
        yield
    except StoreError as error:
        if not folder.name.isdigit():  # the prompts of a run: no iteration makes them again
            raise
        raise StoreError(
            error.cause,
            field=error.field,
            fix=f"restore the file from a backup; or remove {folder.name} and all later numbers from iterations/, checkpoints/ and "
            f"exports/ in {folder.parent.parent}, then resume, and they are computed again",
        ) from error


def seal(folder: Path, table: str) -> None:
    """Turn the journal into a Parquet file; nothing happens if it already is one."""
    journal = journal_path(folder, table)
    if not sealed_path(folder, table).exists():
        _write_parquet(folder, table, read(folder, table))
    elif journal.exists():
        read(folder, table)  # the journal may go if the Parquet file can be trusted
    _remove(journal)


def write(folder: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Make `rows` the complete table, all of them or none."""
    _write_parquet(folder, table, _aligned([json.loads(json.dumps(row, default=_files.plain)) for row in rows]))
    _remove(journal_path(folder, table))


def _remove(journal: Path) -> None:
    with _files.explained(journal):
        journal.unlink(missing_ok=True)


def _aligned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _write_parquet(folder: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(_to_arrow(rows), sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    entry = {"rows": len(rows), "bytes": len(data), "sha256": _files.sha256(data)}
    update_manifest(folder, tables={**manifest(folder).get("tables", {}), table: entry})
    _files.replace(sealed_path(folder, table), data)


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


def _read_parquet(path: Path, recorded: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """`recorded`: size and checksum, None for a table of format 1."""
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
