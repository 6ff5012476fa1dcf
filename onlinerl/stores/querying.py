"""SQL over the labels of a run, by DuckDB."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from onlinerl.errors import StoreError
from onlinerl.stores import _files, labelled

TABLE = "labels"
"""What a query calls them."""


def query(run: Path, statement: str, iteration: int | None = None, oracle: str = "") -> pa.Table:
    """What a statement finds in the table `labels`, whose rows are those of the export. It may read files of its own beside it.

    The labels go through a Parquet file in the directory for temporary files, so they need not fit into memory; what the statement finds has to.

    Args:
        run: the run directory.
        statement: in DuckDB's SQL, e.g. `SELECT oracle_version, sum(usd) FROM labels GROUP BY ALL`.
        iteration: only labels of this one.
        oracle: only labels of annotators and versions that contain it.

    Raises:
        StoreError: if there is no run, it is damaged, or the statement cannot be answered.
    """
    with tempfile.TemporaryDirectory(prefix="onlinerl-labels-") as folder:
        file = Path(folder) / "labels.parquet"
        labelled.export(run, file, iteration, oracle)
        with duckdb.connect(config={"temp_directory": folder}) as database:
            database.read_parquet(str(file)).create_view(TABLE)
            try:
                found = database.sql(statement)
                if found is None:
                    raise StoreError(
                        "the statement finds no rows", field="query", fix=f"write one that does: SELECT ... FROM {TABLE}"
                    )
                return _ordinary(found.to_arrow_table())
            except duckdb.Error as error:
                raise StoreError(
                    f"DuckDB cannot answer it: {error}",
                    field="query",
                    fix=f"correct it; `DESCRIBE {TABLE}` lists the columns",
                ) from error


def _ordinary(found: pa.Table) -> pa.Table:
    """The same with whole numbers and floats where DuckDB counts in decimals: a sum of whole numbers is one of 38 digits."""
    for i, field in enumerate(found.schema):
        if pa.types.is_decimal(field.type):
            column = found.column(i)
            try:
                column = column.cast(pa.int64() if field.type.scale == 0 else pa.float64())
            except pa.ArrowInvalid:  # more than 64 bits
                column = column.cast(pa.float64())
            found = found.set_column(i, field.name, column)
    return found


def plain(found: pa.Table) -> list[dict[str, Any]]:
    """The rows as JSON knows them: a number that is not finite is None, and what is neither number, text, list nor mapping is text."""
    rows: list[dict[str, Any]] = json.loads(json.dumps(_files.finite(found.to_pylist()), default=str))
    return rows
