"""Rows <-> Arrow. Numbers per token, which are most of what a run stores, pass through numpy and never become Python objects here."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]

PER_TOKEN = frozenset({"token_ids", "logprobs", "old_logprobs", "reference_logprobs", "anchor_logprobs", "values", "ches"})
"""Columns with one array of numbers per response."""
_RENAMED = {"old": "old_logprobs", "reference": "reference_logprobs"}
"""Columns of formats 1 to 5, in any table -> what they are called now. Files keep the names that they were written with, and are read as if
they had the present ones."""


def per_token(numbers: pa.DataType) -> pa.DataType:
    """The type of such a column."""
    return pa.list_(pa.list_(numbers))


def to_batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows with the columns of a schema; a key that a row lacks is null.

    Raises:
        TypeError: if a value is not of its column's type.
    """
    others = [field for field in schema if not is_per_token(field)]
    try:
        columns = dict(zip([f.name for f in others], pa.array(rows, pa.struct(others)).flatten(), strict=True))
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # one after the other, to find out which it is
        columns = {field.name: _column(rows, field) for field in others}
    return pa.RecordBatch.from_arrays(
        [columns[field.name] if field.name in columns else _column(rows, field) for field in schema], schema=schema
    )


def _column(rows: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
    cells = [row.get(field.name) for row in rows]
    try:
        return _ragged(cells, field.type) if is_per_token(field) else _plain(cells, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"column {field.name!r} holds {field.type}: {error}") from error


def rows_of(batch: pa.RecordBatch, *, arrays: bool = True) -> list[Row]:
    """The rows of a batch, whichever format wrote it. With `arrays`, numbers per token are numpy arrays, one per response; else lists."""
    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        columns[as_now(field.name)] = _arrays(column) if arrays and is_per_token(field) else _cells(column)
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def as_now(column: str) -> str:
    """The present name of a column."""
    return _RENAMED.get(column, column)


def is_per_token(field: pa.Field) -> bool:
    """Whether a column has one array of numbers per response."""
    return as_now(field.name) in PER_TOKEN and pa.types.is_list(field.type) and pa.types.is_list(field.type.value_type)


def _ragged(cells: Sequence[Sequence[Any] | None], kind: pa.DataType) -> pa.Array:
    numbers = kind.value_type.value_type
    groups: list[Sequence[Any]] = [() if cell is None else cell for cell in cells]
    inner = [sequence for group in groups for sequence in group]
    outer_offsets = np.array([0, *accumulate(map(len, groups))], np.int32)
    inner_offsets = np.array([0, *accumulate(map(len, inner))], np.int32)
    dtype = np.dtype(numbers.to_pandas_dtype())
    flat = np.concatenate([np.empty(0, dtype), *(_array(sequence, dtype) for sequence in inner)])
    lists = pa.ListArray.from_arrays(inner_offsets, pa.array(flat, numbers), type=kind.value_type)
    mask = pa.array([cell is None for cell in cells]) if any(cell is None for cell in cells) else None
    return pa.ListArray.from_arrays(outer_offsets, lists, type=kind, mask=mask)


def _array(numbers: Sequence[Any], dtype: np.dtype[Any]) -> np.ndarray:
    if not isinstance(numbers, tuple | list):
        return np.asarray(numbers, dtype)
    try:  # a quarter of the time that numpy takes for Python's own numbers
        return np.frombuffer(struct.pack(f"{len(numbers)}{dtype.char}", *numbers), dtype)
    except struct.error as error:
        raise TypeError(str(error)) from error


def _arrays(column: pa.ListArray) -> list[list[np.ndarray] | None]:
    lists = column.values
    flat = lists.values.to_numpy(zero_copy_only=False)
    inner, outer = lists.offsets.to_numpy().tolist(), column.offsets.to_numpy().tolist()
    present = column.is_valid().to_pylist() if column.null_count else [True] * len(column)
    return [
        [flat[inner[i] : inner[i + 1]] for i in range(outer[row], outer[row + 1])] if present[row] else None
        for row in range(len(column))
    ]


def _cells(column: pa.Array) -> list[Any]:
    """`column.to_pylist()`, several times as fast where nothing is null."""
    kind = column.type
    plain: list[Any]
    if column.null_count or not len(column):
        plain = column.to_pylist()
        return plain
    if pa.types.is_list(kind):
        inner, offsets = _cells(column.flatten()), column.offsets.to_numpy()
        return [inner[start:end] for start, end in pairwise((offsets - offsets[0]).tolist())]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return [dict(zip(names, cells, strict=True)) for cells in zip(*map(_cells, column.flatten()), strict=True)]
    is_plain = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    plain = column.to_numpy(zero_copy_only=False).tolist() if is_plain else column.to_pylist()
    return plain


def _plain(cells: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(cells, kind)
    except UnicodeEncodeError:  # half a surrogate pair, which an oracle may say and UTF-8 does not know, is written out
        return pa.array([_encodable(cell) for cell in cells], kind)


def _encodable(cell: Any) -> Any:
    if isinstance(cell, str):
        return cell.encode("utf-8", "backslashreplace").decode()
    if isinstance(cell, Mapping):
        return {key: _encodable(value) for key, value in cell.items()}
    return [_encodable(value) for value in cell] if isinstance(cell, list | tuple) else cell
