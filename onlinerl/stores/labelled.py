"""The labels of a run with what they are about: one row each, read without the run's lock, as plain data or as one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onlinerl.errors import StoreError
from onlinerl.protocols.store import ANCHOR_VERDICTS, ANCHORS, EVALUATION, EVALUATION_VERDICTS, REFRESHED_VERDICTS, ROLLOUTS
from onlinerl.stores import _files, labels, summary
from onlinerl.stores._arrow import to_batch
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.rows import COST, LABELS

_SAID = [field for field in LABELS.schema if field.name not in ("prompt_id", "cost", "saved")]
_INT, _TEXT = pa.int64(), pa.string()
SCHEMA = pa.schema(
    [
        pa.field("run", _TEXT),
        pa.field("run_seed", _INT),
        pa.field("iteration", _INT),
        pa.field("table", _TEXT),
        pa.field("prompt_id", _TEXT),
        pa.field("prompt", _TEXT),
        pa.field("responses", pa.list_(_TEXT)),
        pa.field("policy_versions", pa.list_(_INT)),
        pa.field("seeds", pa.list_(_INT)),
        *_SAID,
        *COST,
        *(pa.field(f"saved_{field.name}", field.type) for field in COST),
    ]
)
"""Columns of the export: what was asked, what was said, and what it has cost."""

_AT_ONCE = 1000
"""Rows that are encoded together."""


def rows(run: Path, iteration: int | None = None, oracle: str = "") -> Iterator[dict[str, Any]]:
    """One row for each label, failures too, as the export has them.

    Args:
        run: the run directory.
        iteration: only of this one.
        oracle: only of annotators and versions that contain it; failures say neither, and are left out then.

    Raises:
        StoreError: if there is no run or it is damaged.
    """
    manifest = summary.manifest(run)
    known = {"run": manifest["name"], "run_seed": (manifest.get("fingerprint") or {}).get("seed")}
    for folder in labels.folders(run):
        number = int(folder.name)
        for table in labels.tables(folder) if iteration in (None, number) else ():
            for chunk in TableFiles(folder, table).chunks(arrays=False):
                kept = [
                    row for row in chunk if oracle in f"{row['annotator'] or ''} {row['oracle_version'] or ''}" or not oracle
                ]
                for row, about in zip(kept, _about(folder, table, [row["prompt_id"] for row in kept]), strict=True):
                    yield {**known, "iteration": number, "table": table, **about, **_flat(row)}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Costs as columns; one that was not stored is nothing."""
    names = [field.name for field in COST]
    paid, saved = row.get("cost") or {}, row.get("saved") or {}
    said = {key: value for key, value in row.items() if key not in ("cost", "saved")}
    return {**said, **{name: paid.get(name, 0) for name in names}, **{f"saved_{name}": saved.get(name, 0) for name in names}}


def _about(folder: Path, table: str, prompt_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each of these labels of a table is about."""
    sources = [(folder, ROLLOUTS)]
    if table in (EVALUATION_VERDICTS, REFRESHED_VERDICTS) or table.startswith(labels.COMPARISONS):
        sources = [(folder, EVALUATION)]
    if table.startswith(labels.COMPARISONS):
        sources.append((folder.parent / table.removeprefix(labels.COMPARISONS), EVALUATION))
    if table == ANCHOR_VERDICTS:
        sources = [(folder.parent / "0000", ANCHORS)]
    found = [TableFiles(*source).rows(prompt_ids) for source in sources]
    for groups in zip(*found, strict=True):
        there = [group for group in groups if group is not None]
        yield {
            "prompt": there[0]["prompt"] if there else None,
            "responses": [text for group in there for text in group["texts"]],
            "policy_versions": [version for group in there for version in group["policy_versions"]],
            "seeds": [seed for group in there for seed in group["seeds"]],
        }


def export(run: Path, file: Path, iteration: int | None = None, oracle: str = "") -> int:
    """Write the rows to a Parquet file, all of it or none; returns how many there are.

    Raises:
        StoreError: if there is no run, it is damaged, or the file cannot be written.
    """
    count, some = 0, list[dict[str, Any]]()
    if not file.parent.is_dir():
        raise StoreError(f"there is no directory {file.parent}", field="export", fix="create it, or correct the path")
    temporary = file.with_name(f".{file.name}{_files.TEMPORARY}")
    with _files.explained(file):
        try:
            with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
                for row in rows(run, iteration, oracle):
                    some.append(row)
                    count += 1
                    if len(some) == _AT_ONCE:
                        writer.write_batch(to_batch(some, SCHEMA))
                        some.clear()
                writer.write_batch(to_batch(some, SCHEMA))
            temporary.rename(file)
        finally:
            temporary.unlink(missing_ok=True)
    return count
