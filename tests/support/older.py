"""Writes tables and runs as formats 1 to 5 had them."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from onlinerl.stores import _files, _journal, _manifest
from onlinerl.stores.directory import RunDirectory
from onlinerl.synonyms import RENAMED

COLUMNS = {"old_logprobs": "old", "reference_logprobs": "reference"}
"""Columns of today -> what formats 1 to 5 called them."""
LATER = {"anchor_logprobs", "ches"}
"""Columns that they did not have."""


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]], *, checksums: bool = True) -> None:
    """Add rows to a journal of JSON lines; format 1 had no checksums."""
    with path.open("ab") as file:
        for row in rows:
            body = json.dumps(row, separators=(",", ":")).encode("ascii")
            file.write((b"%08x " % zlib.crc32(body) if checksums else b"") + body + b"\n")


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A complete table; returns what the manifest said about it."""
    columns = {name: [_plain(row[name]) for row in rows] for name in (rows[0] if rows else ())}
    arrays, fields = [], []
    for name, cells in columns.items():
        array = _native(cells)
        if array is None:
            array = pa.array([json.dumps(cell) for cell in cells], pa.string())
            fields.append(pa.field(name, pa.string(), metadata={b"onlinerl.encoding": b"json"}))
        else:
            fields.append(pa.field(name, array.type))
        arrays.append(array)
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields))
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    path.write_bytes(data := sink.getvalue().to_pybytes())
    return {"rows": len(rows), "bytes": len(data), "sha256": _files.sha256(data)}


def _plain(cell: Any) -> Any:
    """NaN was null."""
    if isinstance(cell, float) and np.isnan(cell):
        return None
    return [_plain(value) for value in cell] if isinstance(cell, list) else cell


def _native(cells: list[Any]) -> pa.Array | None:
    try:
        array = pa.array(cells)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None
    return array if json.dumps(array.to_pylist()) == json.dumps(cells) else None


def as_format_3(run: Path) -> None:
    """Rewrite the tables of a run of today: one Parquet file each where they are complete, else one journal of JSON lines."""
    with RunDirectory.open(run) as opened:
        tables = {
            (folder, name): (opened.read(int(folder.name), name), entry["sealed"])
            for folder in sorted((run / "iterations").iterdir())
            for name, entry in _files.read_json(folder / "manifest.json").get("tables", {}).items()
        }
        open_tables = {(journal.parent, journal.name.split(".")[0]) for journal in (run / "iterations").glob("*/*.journal")}
        for folder, name in open_tables - tables.keys():
            tables[folder, name] = (opened.read(int(folder.name), name), False)
        prompts = {name: opened.prompts(name) for name in ("train", "heldout")}
    for (folder, name), (rows, sealed) in tables.items():
        _remove(folder, name)
        if name == "base_logprobs":
            rows = [{"prompt_id": row["prompt_id"], "logprobs": row["logprobs"][0]} for row in rows]
        elif name == "logprobs":
            rows = [{COLUMNS.get(key, key): cell for key, cell in row.items() if cell is not None} for row in rows]
        _record(folder, name, write_parquet(folder / f"{name}.parquet", rows) if sealed else None)
        if not sealed:
            append_lines(folder / f"{name}.jsonl", _plain_rows(rows))
    from onlinerl.stores.rows import prompt_row

    for name, kept in prompts.items():
        _remove(run / "prompts", name)
        _record(run / "prompts", name, write_parquet(run / "prompts" / f"{name}.parquet", [prompt_row(p) for p in kept or ()]))
    _say_format(run, 3)


def _plain_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: _plain(cell) for key, cell in row.items()} for row in rows]


def _remove(folder: Path, name: str) -> None:
    shutil.rmtree(folder / f"{name}.parquet", ignore_errors=True)
    for journal in folder.glob(f"{name}.*.journal"):
        journal.unlink()


def _record(folder: Path, name: str, entry: dict[str, Any] | None) -> None:
    stored = _files.read_json(folder / "manifest.json")
    tables = {**stored.get("tables", {}), name: entry}
    _files.replace_json(
        folder / "manifest.json", {**stored, "tables": {key: value for key, value in tables.items() if value is not None}}
    )


def as_format_5(run: Path) -> None:
    """Name the columns of a run of today as format 5 did, in the parts of its tables and in their journals."""
    for name in ("logprobs", "base_logprobs"):
        for part in sorted(run.glob(f"iterations/*/{name}.parquet/*")):
            folder, number = part.parents[1], int(part.stem)
            rows = pq.read_metadata(part).row_group(0).num_rows
            table = _with_old_columns(pq.read_table(part))
            pq.write_table(table, part, row_group_size=rows, compression="zstd", write_page_checksum=True)
            entry, data = _manifest.table(folder, name), part.read_bytes()
            entry["parts"][number - 1] = {"rows": table.num_rows, "bytes": len(data), "sha256": _files.sha256(data)}
            _manifest.update_table(folder, name, entry)
        for path in run.glob(f"iterations/*/{name}.*.journal"):
            batches = [_with_old_columns(batch) for batch in _journal.read(path)]
            path.unlink()
            journal = _journal.Journal(path, batches[0].schema)
            for batch in batches:
                journal.append(batch)
    _say_format(run, 5)


def as_before_the_ledger(run: Path) -> None:
    """Leave out of the labels of a run of today by what they are found, and where they come from, and of the run what its starts have cost."""
    for path in run.glob("iterations/*/*"):
        if path.suffix == ".journal" and "key" in (batches := [*_journal.read(path)])[0].schema.names:
            path.unlink()
            journal = _journal.Journal(path, batches[0].select(_known(batches[0])).schema)
            for batch in batches:
                journal.append(batch.select(_known(batch)))
        for part in sorted(path.glob("*")) if path.suffix == ".parquet" else ():
            table = pq.read_table(part)
            if "key" in table.schema.names:
                pq.write_table(table.select(_known(table)), part, compression="zstd", write_page_checksum=True)
                entry, data = _manifest.table(path.parent, path.stem), part.read_bytes()
                entry["parts"][int(part.stem) - 1] |= {"bytes": len(data), "sha256": _files.sha256(data)}
                _manifest.update_table(path.parent, path.stem, entry)
    manifest = _files.read_json(run / "manifest.json")
    _files.replace_json(run / "manifest.json", {key: value for key, value in manifest.items() if key != "trials"})


def _known(table: Any) -> list[str]:
    return [name for name in table.schema.names if name not in ("key", "reused_from", "saved", "questions", "failed_replies")]


def _with_old_columns(table: Any) -> Any:
    had = table.select([name for name in table.schema.names if name not in LATER])
    return had.rename_columns([COLUMNS.get(name, name) for name in had.schema.names])


def _say_format(run: Path, number: int) -> None:
    for manifest in [run / "manifest.json", *run.glob("iterations/*/manifest.json"), *run.glob("prompts/manifest.json")]:
        _files.replace_json(manifest, {**_files.read_json(manifest), "format": number})


def with_old_keys(run: Path) -> set[str]:
    """Name the keys of a run of today as format 4 did, in its configuration and in its fingerprint; returns those that it has."""
    as_format_5(run)  # and the columns
    config = yaml.safe_load((run / "config.yaml").read_text())
    manifest = _files.read_json(run / "manifest.json")
    written = set()
    for old, new in RENAMED.items():
        section, _, leaf = new.partition(".")
        if leaf in config.get(section, {}):
            config[section][old.partition(".")[2]] = config[section].pop(leaf)
            written.add(old)
    names = {new: old for old, new in RENAMED.items() if old in written}
    fingerprint = {names.get(key, key): value for key, value in manifest["fingerprint"].items()}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _files.replace_json(run / "manifest.json", {**manifest, "fingerprint": fingerprint})
    _say_format(run, 4)
    return written
