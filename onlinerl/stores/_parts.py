"""A part of a table: one Parquet file that never changes, of bounded size, with checksums of its own.

The manifest of the iteration holds its size and SHA-256; Parquet's page checksums, written too, do not cover its metadata. Rows are kept
in row groups of about a mebibyte, so that a few of them can be read without the others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onlinerl.stores import _files
from onlinerl.stores._arrow import as_now, is_per_token

ROW_GROUP_BYTES = 1 << 20


def write(path: Path, batches: Sequence[pa.RecordBatch]) -> dict[str, Any]:
    """Write a part, durably, with the present names of its columns; returns what the manifest must say about it."""
    table = pa.Table.from_batches(batches)  # of a journal, maybe, that an older version began
    table = table.rename_columns([as_now(column) for column in table.column_names])
    rows = max(1, table.num_rows * ROW_GROUP_BYTES // max(1, table.nbytes))
    sink = pa.BufferOutputStream()
    # Numbers per token hardly repeat: a dictionary of them costs time and room, and the bytes of floats compress best by their places.
    numbers = [field for field in table.schema if is_per_token(field)]
    pq.write_table(
        table,
        sink,
        row_group_size=rows,
        compression="zstd",
        compression_level=1,
        use_dictionary=[path for field in table.schema if field not in numbers for path in _leaves(field.name, field.type)],
        use_byte_stream_split=[
            path for field in numbers for path in _leaves(field.name, field.type) if _is_float(field.type.value_type)
        ],
        write_page_checksum=True,
        write_statistics=False,  # nobody looks for rows by their tokens
    )
    data = sink.getvalue().to_pybytes()
    _files.replace(path, data)
    return {"rows": table.num_rows, "bytes": len(data), "sha256": _files.sha256(data)}


def _is_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind.value_type))


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """What Parquet calls the columns that a column is made of."""
    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaves(f"{path}.{child.name}", child.type)]
    return [path]


class Part:
    """A part that is read.

    Args:
        path: of the file.
        recorded: what the manifest says about it.

    Raises:
        StoreError: if it is gone or damaged.
    """

    def __init__(self, path: Path, recorded: Mapping[str, Any]) -> None:
        self._path = path
        try:
            data = path.read_bytes()
            if _files.sha256(data) != recorded["sha256"]:
                raise _files.damaged(path, "its content does not agree with its checksum")
            # Of the bytes that were checked, not of the file, which may change.
            self._file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        except FileNotFoundError as error:
            raise _files.damaged(path, "it was complete, and is gone") from error
        except (pa.ArrowException, OSError) as error:
            raise _files.damaged(path, str(error)) from error
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self.starts = [sum(counts[:i]) for i in range(len(counts))]
        """The first row of each row group."""

    def batch(self, number: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """One row group."""
        try:
            table = self._file.read_row_group(number, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _files.damaged(self._path, str(error)) from error
        (batch,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
        return batch

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All row groups."""
        for number in range(len(self.starts)):
            yield self.batch(number, columns)


def holding(starts: Sequence[int], row: int) -> int:
    """Which of the batches that start at these rows holds a row."""
    return bisect_right(starts, row) - 1
