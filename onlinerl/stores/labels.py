"""The ledger of a run: its tables of labels, found by what was asked, and what they have cost.

Other runs are read without their lock, while they write too. Each run writes to its own tables only, so any number of them may share their
labels: what two ask at the same moment both pay for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from onlinerl.errors import StoreError
from onlinerl.protocols.store import ANCHOR_VERDICTS, EVALUATION_VERDICTS, REFRESH_LABELS, REFRESHED_VERDICTS, VERDICTS
from onlinerl.stores import _manifest, summary
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.rows import LABELS, cost_from_row
from onlinerl.stores.tables import StoredTable
from onlinerl.types import Cost, Label, Verdict

COMPARISONS, RELABELS = "comparisons_", "relabels_"
"""What the names of other tables of labels begin with: those of answers to the held-out prompts with an earlier iterate's, and those of
another oracle."""
KEPT = "oracle"
"""In a run directory: what an oracle keeps before it is a label (`Oracle.remember`)."""
TRIALS = "trials"
"""In the manifest of a run: what the questions of each of its starts have cost."""
_OPENED = 16


def tables(folder: Path) -> list[str]:
    """The tables of labels of an iteration, by its folder."""
    own = (VERDICTS, EVALUATION_VERDICTS, ANCHOR_VERDICTS, REFRESH_LABELS, REFRESHED_VERDICTS)
    return sorted(name for name in _manifest.tables(folder) if name in own or name.startswith((COMPARISONS, RELABELS)))


def folders(run: Path) -> list[Path]:
    """Of the iterations of a run, ascending."""
    found = (path for path in (run / "iterations").glob("[0-9]*") if path.name.isdigit())
    return sorted(found, key=lambda path: int(path.name))


def paid(run: Path) -> Cost:
    """What all labels and all starts of a run have cost, failures included. Damaged tables are left out: whoever needs one refuses it.

    Raises:
        StoreError: if there is no run.
    """
    total = Cost()
    for cost in summary.manifest(run).get(TRIALS, ()):
        total = total.plus(cost_from_row(cost))
    for row in _rows(run, ["cost"]):
        total = total.plus(cost_from_row(row.get("cost")))
    return total


def _rows(run: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for folder in folders(run):
        for table in tables(folder):
            with suppress(StoreError):
                for rows in TableFiles(folder, table).chunks(columns):
                    yield from rows


def record_trial(store: RunDirectory, cost: Cost) -> None:
    """What a start has cost, before anything is judged."""
    kept = store.manifest.get(TRIALS, [])
    store.update_manifest(**{TRIALS: [*kept, {name: getattr(cost, name) for name in Cost.__dataclass_fields__}]})


class _Place(NamedTuple):
    """Where a label is."""

    folder: Path
    """Of its iteration."""
    table: str
    prompt_id: str

    @property
    def shown(self) -> str:
        return "/".join([*self.folder.parts[-3:], self.table])


class Ledger:
    """A Ledger (see the protocol) of a run that is written. Any thread may call it.

    Args:
        store: of the run.
        reuse_from: a run or a folder of runs whose labels are used too.
    """

    def __init__(self, store: RunDirectory, reuse_from: Path | None = None) -> None:
        self._store, self._others = store, reuse_from
        self._places: dict[str, _Place] = {}
        self._seen: dict[Path, object] = {}
        self._opened: OrderedDict[tuple[Path, str], StoredTable[Label]] = OrderedDict()
        self._lock = threading.RLock()
        self.unreadable: list[str] = []
        """What is wrong with tables that are left out; whoever needs one refuses it."""
        for folder in folders(store.path):
            self._try(folder)
        self.look_again()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, key: str) -> Label | None:
        """The label of a question, at no cost; None if it is not known."""
        with self._lock:
            place = self._places.get(key)
            label = None if place is None else self._label(place)
        if place is None or label is None or label.key != key or not isinstance(label.result, Verdict):
            return None
        first = label.reused_from is None
        return replace(
            label,
            result=replace(label.result, cost=Cost()),
            reused_from=place.shown if first else label.reused_from,
            saved=label.result.cost if first else label.saved,
        )

    def add(self, iteration: int, table: str, labels: Iterable[Label]) -> None:
        """What the run has just written to a table."""
        folder = self._folder(iteration)
        with self._lock:
            for label in labels:
                if label.key and isinstance(label.result, Verdict):
                    self._places[label.key] = _Place(folder, table, label.prompt_id)

    def look_again(self) -> None:
        """See what other runs have written meanwhile."""
        for run in self._runs():
            for folder in folders(run):
                state = _state(folder)
                if self._seen.get(folder) != state:
                    self._seen[folder] = state
                    self._try(folder)

    def _try(self, folder: Path) -> None:
        try:
            self._read(folder)
        except StoreError as error:
            self.unreadable.append(error.cause)

    def _runs(self) -> list[Path]:
        if self._others is None:
            return []
        found = [self._others] if (self._others / "manifest.json").exists() else summary.runs(self._others)
        return [run for run in found if run.resolve() != self._store.path.resolve()]

    def _folder(self, iteration: int) -> Path:
        return self._store.path / "iterations" / f"{iteration:04d}"

    def _read(self, folder: Path) -> None:
        for table in tables(folder):
            rows = [row for chunk in TableFiles(folder, table).chunks(["prompt_id", "status", "key"]) for row in chunk]
            with self._lock:
                self._opened.pop((folder, table), None)
                for row in rows:
                    if row.get("key") and row["status"] == "ok":
                        self._places.setdefault(row["key"], _Place(folder, table, row["prompt_id"]))

    def _label(self, place: _Place) -> Label | None:
        if place.folder.parent.parent == self._store.path:
            return next(self._store.labels(int(place.folder.name), place.table).select([place.prompt_id]))
        with suppress(StoreError):  # of another run, which may have been removed
            return next(self._table(place).select([place.prompt_id]))
        return None

    def _table(self, place: _Place) -> StoredTable[Label]:
        key = (place.folder, place.table)
        if key not in self._opened:
            self._opened[key] = StoredTable(TableFiles(*key), LABELS)
        self._opened.move_to_end(key)
        while len(self._opened) > _OPENED:
            self._opened.popitem(last=False)
        return self._opened[key]


def _state(folder: Path) -> object:
    """Changes whenever a table of an iteration does."""
    with suppress(OSError):  # a journal may become a part meanwhile
        return tuple(sorted((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()))
    return object()
