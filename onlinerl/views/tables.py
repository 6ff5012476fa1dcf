"""Tables of a run as whole Arrow tables and data frames, for notebooks. Read without the run's lock, also while it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from onlinerl.errors import OnlineRLError, StoreError
from onlinerl.stores import summary

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["pandas", "arrow"]


def rows(run: Path, table: str, iterations: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a table of these iterations, each with its `iteration`.

    Raises:
        StoreError: if no iteration of the run has such a table, or it is damaged.
    """
    found = [{"iteration": t, **row} for t in iterations for row in summary.rows(run, t, table)]
    if not found and table not in (known := summary.tables(run)):
        raise StoreError(
            f"{run} has no table {table!r}",
            field="table",
            fix=f"choose one of {', '.join(known)}" if known else "wait until the first phase has written one",
        )
    return found


def converted(rows: Sequence[Mapping[str, Any]], format: Format, columns: Sequence[str] = ()) -> pd.DataFrame | pa.Table:
    """Rows as a data frame or an Arrow table, which has `columns` even without rows. A column that mixes types is JSON text in Arrow.

    Raises:
        OnlineRLError: if pandas is asked for and not installed, or there is no such format.
    """
    keys = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    if format == "arrow":
        return pa.table({key: _array([row.get(key) for row in rows]) for key in keys})
    if format != "pandas":
        raise OnlineRLError(f"{format!r} is not known", field="format", fix="choose 'pandas' or 'arrow'")
    try:
        import pandas
    except ModuleNotFoundError:
        raise OnlineRLError(
            "pandas is not installed", field="format", fix="pip install pandas, or ask for format='arrow'"
        ) from None
    return pandas.DataFrame(list(rows), columns=keys)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys joined by underscores."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        found |= flat(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _array(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([json.dumps(value) for value in values], pa.string())
