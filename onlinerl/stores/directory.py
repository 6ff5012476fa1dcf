"""A run is a directory: its manifest, its configuration, what every iteration sampled and judged, checkpoints, exports, references.

    manifest.json            identity of the run and how it stands
    config.yaml              the whole configuration, defaults included
    metrics.jsonl            every figure (written by the jsonl tracker)
    prompts/                 the prompts that the run uses, whatever becomes of the files they were read from
    lock                     held by the one process that may write
    iterations/0001/         manifest.json with the finished phases and checksums, and the tables of that iteration
    checkpoints/0001/        resumable state after iteration 1
    auxiliary/0001/          the same of the auxiliary weights, for algorithms that have some
    exports/0001/            the policy after iteration 1 in Hugging Face format
    oracle/                  what an oracle has paid for and not yet made a verdict of, if it keeps any
    references/0001/         the reference after iteration 1, where it is an average of iterates

Each method leaves the directory in a state from which a run can be resumed, wherever it is killed. Any thread may call them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import pyarrow as pa

from onlinerl.errors import StoreError
from onlinerl.protocols.store import ANCHORS, PAIRS, SELECTION, Kind
from onlinerl.stores import _artefacts, _files, _identity, _manifest, rows
from onlinerl.stores._lock import Lock, caveat
from onlinerl.stores._scratch import Scratch, scratch
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.tables import StoredTable
from onlinerl.types import Group, Label, LogProbs, PhaseRecords, Prompt, Selected, TrainedPair

__all__ = ["RunDirectory"]

KINDS: tuple[Kind, ...] = get_args(Kind)
_PROMPTS = "prompts"
_AT_ONCE = 1000
"""Prompts that are encoded together."""
_REMEMBERED = 8
"""Tables of which it is known where each row is."""
T = TypeVar("T")


class RunDirectory:
    """The run directory, open for writing and locked until `close`. Use `create` or `open`."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path = path
        self._lock = lock
        self._one_at_a_time = threading.RLock()
        self._closed = False
        self._tables: OrderedDict[tuple[int, str], TableFiles] = OrderedDict()

    @classmethod
    def create(cls, path: str | Path, *, config_yaml: str, manifest: Mapping[str, Any]) -> RunDirectory:
        """Start a run, or continue the same one if `path` already holds it (same `config_digest`).

        `manifest` says what the run is: name, config_digest, fingerprint, model, reference, packages. The store adds format,
        created, attempt (0) and status ("running") unless they are given. When the run is continued, the stored manifest and
        configuration stay as they are.

        Raises:
            StoreError: if the directory holds another run or other files, is in use, or cannot be written.
        """
        path = Path(path)
        with _files.explained(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path / _identity.LOCK)
        with _released_on_error(lock):
            run = cls(path, lock)
            if (path / _identity.MANIFEST).exists():
                _identity.require_same(path, run.manifest, manifest)
            else:
                _identity.require_empty(path)
                _files.replace(path / _identity.CONFIG, config_yaml.encode())
                started = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "attempt": 0}
                # Last: a directory without a manifest is not a run yet.
                _files.replace_json(path / _identity.MANIFEST, {**started, "status": "running", **manifest})
            run._recover()
            return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Continue an existing run.

        Raises:
            StoreError: if there is no run, its manifest is damaged or of another format, or another process is writing to it.
        """
        path = Path(path)
        if not (path / _identity.MANIFEST).is_file():
            raise _identity.no_run(path)
        lock = Lock(path / _identity.LOCK)
        with _released_on_error(lock):
            run = cls(path, lock)
            _identity.require_readable(path, run.manifest)
            run._recover()
            return run

    @staticmethod
    def move_aside(path: str | Path) -> Path | None:
        """Rename an existing run to `<name>.1` (or the next free number) and return its new path; None if there is none.

        Raises:
            StoreError: if a process is still writing to it, or what is there never was a run.
        """
        path = Path(path)
        if not path.exists():
            return None
        _identity.require_once_a_run(path)
        lock = Lock(path / _identity.LOCK)
        try:
            number = 1
            while (aside := path.with_name(f"{path.name}.{number}")).exists():
                number += 1
            with _files.explained(path):
                path.rename(aside)
            return aside
        finally:
            lock.release()

    def close(self) -> None:
        """Release the lock. May be called twice; whoever still writes gets a StoreError."""
        with self._one_at_a_time:
            self._closed = True
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the run ---

    @property
    def manifest(self) -> dict[str, Any]:
        """A copy of the run's manifest."""
        return _files.read_json(self.path / _identity.MANIFEST)

    def update_manifest(self, **changes: Any) -> None:
        """Replace some entries of the run's manifest, durably. What is written from here on has the present format."""
        with self._writing():
            _files.replace_json(self.path / _identity.MANIFEST, {**self.manifest, "format": _files.FORMAT, **changes})

    @property
    def caveat(self) -> str | None:
        """What to know about the lock where the run lies; None on a local disk."""
        return caveat(self.path)

    @property
    def config_yaml(self) -> str:
        """The configuration as it was written."""
        return (self.path / _identity.CONFIG).read_text()

    def write_config(self, config_yaml: str) -> None:
        """Replace the stored configuration, for a resume that changes what may be changed."""
        with self._writing():
            _files.replace(self.path / _identity.CONFIG, config_yaml.encode())

    def require_free(self, bytes_needed: int, min_free_bytes: int) -> None:
        """Refuse before anything is written if writing `bytes_needed` would leave less than `min_free_bytes` free.

        Raises:
            StoreError: with the numbers.
        """
        _files.require_free(self.path, bytes_needed, min_free_bytes)

    # --- prompts ---

    def keep_prompts(self, **sets: Sequence[Prompt]) -> None:
        """Store the prompts that this run uses (`train`, `heldout`), in order, and their hashes in the manifest."""
        with self._writing(), _files.explained(self.path):
            if (self.path / _PROMPTS).exists():  # of a start that was killed before it came to an end here
                shutil.rmtree(self.path / _PROMPTS)
        kept = {}
        for name, prompts in sets.items():
            table = self._kept(name)
            for start in range(0, len(prompts), _AT_ONCE):
                table.append(prompts[start : start + _AT_ONCE])
            table.seal()
            kept[name] = {"count": len(prompts), "sha256": _digest(prompts)}
        self.update_manifest(prompts=kept)  # last: before that, the run has no prompts of its own

    def prompts(self, name: str) -> list[Prompt] | None:
        """What `keep_prompts` stored; None if it has not been called.

        Raises:
            StoreError: if it is not what was stored.
        """
        kept = self.manifest.get("prompts")
        if kept is None:
            return None
        prompts = list(self._kept(name))
        if _digest(prompts) != kept[name]["sha256"]:
            raise StoreError(
                f"{self.path / _PROMPTS / name}.parquet does not hold the {kept[name]['count']} prompts of this run",
                field="runs",
                fix="restore it from a backup, or start a new run",
            )
        return prompts

    def keep_anchors(self, groups: Sequence[Group]) -> None:
        """Store the pairs that the oracle is examined by. Call it before `keep_prompts`, and give that their prompts as `anchors`."""
        table = self.groups(0, ANCHORS)
        if not table.sealed:
            table.clear()
            table.append(groups)
            table.seal()

    def anchors(self) -> list[Group]:
        """What `keep_anchors` stored; none if there are none.

        Raises:
            StoreError: if they are not what was stored.
        """
        if "anchors" not in self.manifest.get("prompts", {}):
            return []
        return list(self.groups(0, ANCHORS, {prompt.id: prompt for prompt in self.prompts("anchors") or ()}))

    def _kept(self, name: str) -> StoredTable[Prompt]:
        return StoredTable(self._files(self.path / _PROMPTS, name, rows.PROMPTS.schema), rows.PROMPTS)

    # --- iterations ---

    def iterations(self) -> list[int]:
        """Iterations of which anything is stored, ascending."""
        return sorted(int(p.name) for p in (self.path / "iterations").glob("[0-9]*") if p.name.isdigit())

    def groups(self, iteration: int, table: str, prompts: Mapping[str, Prompt] | None = None) -> StoredTable[Group]:
        """Responses, to these prompts by their ids; without them, a prompt is what its row says of it."""
        return self._table(iteration, table, rows.groups_of(prompts))

    def labels(self, iteration: int, table: str) -> StoredTable[Label]:
        """What an oracle said."""
        return self._table(iteration, table, rows.LABELS)

    def logprobs(self, iteration: int, table: str) -> StoredTable[LogProbs]:
        """What a learner said."""
        return self._table(iteration, table, rows.LOGPROBS)

    def pairs(self, iteration: int) -> StoredTable[TrainedPair]:
        """What was trained on, where that is pairs."""
        return self._table(iteration, PAIRS, rows.PAIRS)

    def selection(self, iteration: int) -> StoredTable[Selected]:
        """The prompts that a selector chose, in their order."""
        return self._table(iteration, SELECTION, rows.SELECTION)

    def rows_from(self, iteration: int) -> int:
        """Rows in the tables of an iteration and of all later ones: a run that gets on has more of them."""
        kept = [(t, name) for t in self.iterations() if t >= iteration for name in _manifest.tables(self._folder(t))]
        with self._one_at_a_time:
            known = [self._tables.get(key) or TableFiles(self._folder(key[0]), key[1]) for key in kept]
        return sum(table.count() for table in known)

    def read(self, iteration: int, table: str) -> list[dict[str, Any]]:
        """All rows of a table as plain data, for people and their tools; a run reads values, and never all of them at once."""
        return [row for chunk in TableFiles(self._folder(iteration), table).chunks(arrays=False) for row in chunk]

    def _table(self, iteration: int, table: str, codec: rows.Codec[T]) -> StoredTable[T]:
        """The table in a part of the disk that all its users share, so that each of its rows is found by its id."""
        with self._one_at_a_time:
            key = (iteration, table)
            if key not in self._tables:
                self._tables[key] = self._files(self._folder(iteration), table, codec.schema)
            self._tables.move_to_end(key)
            for other in [k for k in self._tables if k != key][:-_REMEMBERED]:
                if self._tables[other].sealed:  # one that grows has but one writer, who knows where it ends
                    del self._tables[other]
            return StoredTable(self._tables[key], codec)

    def _files(self, folder: Path, table: str, schema: pa.Schema) -> TableFiles:
        @contextlib.contextmanager
        def writing() -> Iterator[None]:
            with self._writing():
                self._make(folder)
                yield

        return TableFiles(folder, table, schema, writing)

    def scratch(self) -> AbstractContextManager[Scratch]:
        """Room on the disk for what the memory has no room for, as long as the block lasts."""
        return scratch(self.path)

    def finish_phase(self, iteration: int, phase: str, record: Mapping[str, object]) -> None:
        """Mark a phase as done, durably. Numbers that are not finite are stored as null."""
        with self._writing():
            phases: dict[str, object] = {**self.phases(iteration)}
            phases.pop(phase, None)  # a phase that is done again was finished last
            self._make(self._folder(iteration))
            _manifest.update(self._folder(iteration), iteration=iteration, phases={**phases, phase: dict(record)})

    def phases(self, iteration: int) -> PhaseRecords:
        """Finished phases and their records, in the order in which they finished."""
        phases: PhaseRecords = _manifest.read(self._folder(iteration)).get("phases", {})
        return phases

    def phase_done(self, iteration: int, phase: str) -> bool:
        """True if the phase is finished."""
        return phase in self.phases(iteration)

    # --- checkpoints and exports ---

    @contextlib.contextmanager
    def staged(self, kind: Kind, iteration: int) -> Iterator[Path]:
        """A directory to write a checkpoint or an export to.

        When the block ends, it becomes `<kind>/<iteration>` at once (an older one of that number is replaced); if the block
        raises, nothing of it remains and the older one stays.
        """
        with _artefacts.staged(self.path / kind, iteration) as path:
            yield path
            with self._writing():
                pass  # refuses where another process may have the run by now

    def require_files(self, path: Path, written: Mapping[str, int]) -> None:
        """Refuse a staged checkpoint that lacks anything of what the learner says it wrote: bytes of each file, by relative path.

        Raises:
            StoreError: naming the file that is missing or cut short.
        """
        _artefacts.require_files(path, written)

    def artefact(self, kind: Kind, iteration: int) -> Path | None:
        """The checkpoint or export of an iteration, or None unless it is complete. Checksums are not compared: see `require`."""
        return _artefacts.find(self.path / kind, iteration)

    def require(self, kind: Kind, iteration: int) -> Path:
        """The checkpoint or export of an iteration, after every byte of it was compared with its checksum.

        Raises:
            StoreError: naming the file that is missing or damaged, and the iteration that one can go back to.
        """
        try:
            return _artefacts.verified(self.path / kind, iteration)
        except StoreError as error:
            raise StoreError(error.cause, field=kind, fix=self._way_back(iteration)) from error

    def _way_back(self, iteration: int) -> str:
        """What to do about a damaged artefact of `iteration`."""
        whole = 0  # the base model needs no checkpoint
        for number in reversed([n for n in self.artefacts("checkpoints") if n < iteration]):
            with contextlib.suppress(StoreError):
                _artefacts.verified(self.path / "checkpoints", number)
                whole = number
                break
        later = [
            f"{kind}/{path.name}"
            for kind in ("iterations", *KINDS)
            for path in sorted((self.path / kind).glob("[0-9]*"))
            if path.name.isdigit() and int(path.name) > whole
        ]
        return (
            f"restore it from a backup; or go back to iteration {whole}, which is whole: in {self.path}, "
            f"rm -r {' '.join(later)}, then resume, and what came after it is computed again"
        )

    def artefacts(self, kind: Kind) -> list[int]:
        """Iterations that have a complete checkpoint or export, ascending."""
        return _artefacts.numbers(self.path / kind)

    def retain(self, kind: Kind, keep: set[int]) -> None:
        """Remove the checkpoints or exports of all other iterations."""
        _artefacts.retain(self.path / kind, keep)

    # --- inside ---

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One thread at a time, and none once the directory is closed: another process may have it by then."""
        with self._one_at_a_time:
            if self._closed:
                raise StoreError(f"{self.path} is closed", fix="`onlinerl resume` goes on from what is there")
            yield

    def _folder(self, iteration: int) -> Path:
        return self.path / "iterations" / f"{iteration:04d}"

    def _make(self, folder: Path) -> None:
        if folder.is_dir():
            return
        with _files.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _files.sync_directory(folder.parent)
            _files.sync_directory(self.path)

    def _recover(self) -> None:
        with _files.explained(self.path):
            for leftover in [*self.path.glob(f".*{_files.TEMPORARY}"), *self.path.glob(f"iterations/**/.*{_files.TEMPORARY}")]:
                leftover.unlink()
            for kind in KINDS:
                _artefacts.recover(self.path / kind)


@contextlib.contextmanager
def _released_on_error(lock: Lock) -> Iterator[None]:
    try:
        yield
    except (StoreError, OSError):
        lock.release()
        raise


def _digest(prompts: Sequence[Prompt]) -> str:
    hasher = hashlib.sha256()
    for prompt in prompts:
        hasher.update(json.dumps(rows.prompt_row(prompt), sort_keys=True).encode())
    return hasher.hexdigest()
