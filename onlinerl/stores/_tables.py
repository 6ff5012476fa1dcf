"""One table of one iteration: parts that never change, and a journal of the newest rows.

    rollouts.parquet/0001.parquet    a part; the manifest of the iteration lists it
    rollouts.parquet/0002.parquet
    rollouts.0003.journal            rows that will be part 3

A journal becomes a part when it has grown to `PART_BYTES`, and when the table is complete: the part is written, then the manifest lists
it, then the journal goes. A part that the manifest does not list, and a journal of a part that it does list, are what a crash left, and do
not count. So no more than one part is in memory at a time, however long the table.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from onlinerl.errors import StoreError
from onlinerl.stores import _files, _journal, _manifest, _older, _parts
from onlinerl.stores._arrow import Row, rows_of, to_batch
from onlinerl.stores._journal import Journal
from onlinerl.stores._parts import Part

PART_BYTES = 32 << 20
"""How large a journal grows, counted as it is in memory."""
_KEPT_PARTS, _KEPT_BYTES = 3, 32 << 20
"""How many opened parts, and how much of decoded batches, is kept for whoever reads rows by their ids."""
_NONE = pa.schema([])
Place = tuple[int, int]
"""Number of the part, and row in it."""


class TableFiles:
    """The files of a table. Any thread may call it.

    Args:
        folder: of the iteration.
        name: of the table.
        schema: of what is written.
        writing: entered by whoever writes to the run; without it, the table is only read.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        schema: pa.Schema = _NONE,
        writing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.folder, self.name, self._schema, self._writing = folder, name, schema, writing
        self._lock = threading.RLock()
        self._journal: Journal | None = None
        self._index: dict[str, Place] | None = None
        self._count = 0
        """Parts, as far as it is known here."""
        self._is_clean = False
        """Whether what a crash may have left is removed."""
        self._batches: OrderedDict[tuple[int, int, bool], tuple[list[Row], int]] = OrderedDict()
        self._kept_bytes = 0
        self._opened: OrderedDict[int, Part | Journal] = OrderedDict()
        self._older: list[Row] = []

    # --- what there is ---

    @property
    def _entry(self) -> dict[str, Any] | None:
        return _manifest.table(self.folder, self.name)

    @property
    def sealed(self) -> bool:
        """True once the table is complete."""
        entry = self._entry
        if entry is not None and "parts" in entry:
            return bool(entry["sealed"])
        return _older.is_sealed(self.folder, self.name)

    def chunks(self, columns: Sequence[str] | None = None, *, arrays: bool = True) -> Iterator[list[Row]]:
        """All rows, some at a time, in the order in which they were appended. Every byte is compared with its checksum.

        Raises:
            StoreError: if the table is damaged, or a part of it is gone.
        """
        with _manifest.way_back(self.folder):
            for batch in self._stored(columns):
                yield batch if isinstance(batch, list) else rows_of(batch, arrays=arrays)

    def _stored(self, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch | list[Row]]:
        parts = self._parts()
        if parts is None:
            yield _older.rows(self.folder, self.name, self._entry)
            parts = []
        for number in count(1):
            newest: list[pa.RecordBatch] = []
            if number > len(parts):
                # Whoever writes, another process maybe, may turn the journal into a part at any time: then there is one part more.
                newest = list(_journal.read(self._journal_path(number)))
                parts = self._parts() or []
            if number > len(parts):
                yield from (batch if columns is None else _selected(batch, columns) for batch in newest)
                return
            yield from Part(self._part_path(number), parts[number - 1]).batches(columns)

    def _parts(self) -> list[dict[str, Any]] | None:
        """What the manifest says about each part; None if the table, should there be one, is an older version's."""
        entry = self._entry
        if entry is not None and "parts" in entry:
            parts: list[dict[str, Any]] = entry["parts"]
            return parts
        is_older = entry is not None or _older.is_there(self.folder, self.name)
        return None if is_older else []

    def _part_path(self, number: int) -> Path:
        return self.folder / f"{self.name}.parquet" / f"{number:04d}.parquet"

    def _journal_path(self, number: int) -> Path:
        return self.folder / f"{self.name}.{number:04d}.journal"

    def count(self) -> int:
        """How many rows were appended. No part is read for it."""
        with self._lock:
            if (parts := self._parts()) is None:
                return len(_older.rows(self.folder, self.name, self._entry))
            path, known = self._journal_path(len(parts) + 1), self._journal
            newest = known if known is not None and known.path == path else Journal(path, self._schema)
            return sum(int(part["rows"]) for part in parts) + newest.rows

    # --- rows by their ids ---

    def ids(self) -> dict[str, Place]:
        """Where the latest row of each prompt is."""
        with self._lock:
            if self._index is None:
                with _manifest.way_back(self.folder):
                    self._index = dict(self._places())
            return self._index

    def _places(self) -> Iterator[tuple[str, Place]]:
        parts = self._parts()
        if parts is None:
            self._older = _older.rows(self.folder, self.name, self._entry)
            yield from ((row["prompt_id"], (0, i)) for i, row in enumerate(self._older))
            parts = []
        for number in count(1):
            newest: list[pa.RecordBatch] = []
            if number > len(parts):  # as in `_stored`: the journal may become a part at any time
                newest = list(_journal.read(self._journal_path(number)))
                parts = self._parts() or []
            done = number > len(parts)
            if not done:
                part = self._part(number)
                newest = [part.batch(i, ["prompt_id"]) for i in range(len(part.starts))]
            ids = (one for batch in newest for one in batch["prompt_id"].to_pylist())
            yield from ((one, (number, row)) for row, one in enumerate(ids))
            if done:
                self._count = len(parts)
                return

    def rows(self, prompt_ids: Iterable[str]) -> list[Row | None]:
        """The latest row of each prompt, None where there is none.

        Raises:
            StoreError: if what holds one is damaged or gone.
        """
        places = map(self.ids().get, prompt_ids)
        with self._lock, _manifest.way_back(self.folder):
            return [None if place is None else self._row(*place) for place in places]

    def _row(self, number: int, row: int) -> Row:
        if number == 0:
            return self._older[row]
        holder = self._holder(number, row)
        batch = _parts.holding(holder.starts, row)
        return self._decoded(number, batch, holder)[row - holder.starts[batch]]

    def _holder(self, number: int, row: int) -> Part | Journal:
        """What has a row: while a part is a journal, and has been read here before the row came, it is read again."""
        if number > self._count:
            if self._journal is None or self._journal.rows <= row:
                self._journal = Journal(self._journal_path(number), self._schema)
            if row < self._journal.rows:
                return self._journal
            self._count = len(self._parts() or [])  # another process has made it a part
        return self._part(number)

    def _decoded(self, number: int, batch: int, holder: Part | Journal) -> list[Row]:
        key = (number, batch, isinstance(holder, Journal))
        if key not in self._batches:
            decoded = holder.batch(batch)
            self._batches[key] = rows_of(decoded), decoded.nbytes
            self._kept_bytes += decoded.nbytes
        self._batches.move_to_end(key)
        while self._kept_bytes > _KEPT_BYTES and len(self._batches) > 1:
            self._kept_bytes -= self._batches.popitem(last=False)[1][1]
        return self._batches[key][0]

    def _part(self, number: int) -> Part | Journal:
        if number not in self._opened:
            self._keep(number, Part(self._part_path(number), (self._parts() or [])[number - 1]))
        self._opened.move_to_end(number)
        return self._opened[number]

    def _keep(self, number: int, opened: Part | Journal) -> None:
        self._opened[number] = opened
        while len(self._opened) > _KEPT_PARTS:
            self._opened.popitem(last=False)

    # --- writing ---

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns, and none of them is in the table if it raises.

        Raises:
            StoreError: if the table is complete or the disk is full.
            TypeError: if a row cannot be stored.
        """
        if not rows:
            return
        batch = to_batch(rows, self._schema)
        with self._writing(), self._lock:
            self._require_open()
            journal = self._live()
            if journal.rows and journal.schema != self._schema:  # another version wrote it
                self._roll(sealed=False)
                journal = self._live()
            number, first = self._count + 1, journal.rows
            try:
                journal.append(batch)
            except StoreError:
                self._journal = None  # in case the failed write could not be taken back
                raise
            if self._index is not None:
                self._index.update({row["prompt_id"]: (number, first + i) for i, row in enumerate(rows)})
            if journal.bytes >= PART_BYTES:
                self._roll(sealed=False)

    def seal(self) -> None:
        """The table is complete. May be called again."""
        with self._writing(), self._lock:
            if self._parts() is None and self.sealed:
                self._remove_older()
            elif self.sealed:
                self._drop_stale(len(self._parts() or []))
            else:
                self._live()
                self._roll(sealed=True)

    def clear(self) -> None:
        """Begin again: what a killed process left is removed.

        Raises:
            StoreError: if the table is complete.
        """
        with self._writing(), self._lock:
            self._require_open()
            _manifest.update_table(self.folder, self.name, None)
            with _files.explained(self.folder):
                for file in [*self._journals(), _older.journal_path(self.folder, self.name)]:
                    file.unlink(missing_ok=True)
                shutil.rmtree(self._part_path(1).parent, ignore_errors=True)
            self._forget()

    def _forget(self) -> None:
        """What was read is no longer so."""
        self._journal = self._index = None
        self._is_clean = False
        self._batches.clear()
        self._kept_bytes = 0
        self._opened.clear()
        self._older = []

    def _require_open(self) -> None:
        if self._journal is None and self.sealed:
            raise StoreError(
                f"table {self.name!r} of iteration {int(self.folder.name)} is complete and takes no more rows",
                fix="look at the finished phases before appending",
            )

    def _live(self) -> Journal:
        """The journal, to be written to."""
        if not self._is_clean:
            if self._parts() is None:
                self._adopt()
            self._count = len(self._parts() or [])
            self._drop_stale(self._count)
            if _older.journal_path(self.folder, self.name).exists():  # it has become the first part
                self._remove_older()
            self._is_clean = True
        if self._journal is None:
            self._journal = Journal(self._journal_path(self._count + 1), self._schema)
        return self._journal

    def _drop_stale(self, count: int) -> None:
        """A journal may go once the part that it has become can be trusted."""
        for stale in self._journals():
            if stale != self._journal_path(count + 1):
                if count:
                    self._part(count)
                _journal.discard(stale)

    def _adopt(self) -> None:
        """What an older version has written becomes the first part."""
        rows = _older.rows(self.folder, self.name, self._entry)
        parts = [self._write(1, [to_batch(rows, self._schema)])] if rows else []
        _manifest.update_table(self.folder, self.name, {"parts": parts, "sealed": False})
        self._remove_older()
        self._forget()

    def _remove_older(self) -> None:
        """The journal may go once what took its place can be trusted."""
        for _ in self.chunks():
            pass
        _journal.discard(_older.journal_path(self.folder, self.name))

    def _roll(self, *, sealed: bool) -> None:
        """The journal becomes a part."""
        journal, parts = self._live(), list(self._parts() or [])
        if journal.rows:
            parts.append(self._write(len(parts) + 1, journal.batches))
        _manifest.update_table(self.folder, self.name, {"parts": parts, "sealed": sealed})
        _journal.discard(journal.path)
        if self._index is not None and journal.rows:  # somebody reads rows by their ids, and is seldom far behind
            self._keep(len(parts), journal)
        self._journal, self._count = None, len(parts)

    def _write(self, number: int, batches: Sequence[pa.RecordBatch]) -> dict[str, Any]:
        path = self._part_path(number)
        with _files.explained(path):
            path.parent.mkdir(exist_ok=True)
            _files.sync_directory(self.folder)
        return _parts.write(path, batches)

    def _journals(self) -> Iterable[Path]:
        return sorted(self.folder.glob(f"{self.name}.[0-9]*.journal"))


def _selected(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """Those of the columns that there are; an older version's table may lack some, in a part as in a journal."""
    return batch.select([name for name in columns if name in batch.schema.names])
