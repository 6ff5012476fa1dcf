"""A run is a directory: its manifest, its configuration, what every iteration sampled and judged, checkpoints and exports.

    manifest.json            identity of the run and how it stands
    config.yaml              the whole configuration, defaults included
    metrics.jsonl            every figure (written by the jsonl tracker)
    prompts/                 the prompts that the run uses, whatever becomes of the files they were read from
    lock                     held by the one process that may write
    iterations/0001/         manifest.json with the finished phases and checksums, and the tables of that iteration
    checkpoints/0001/        resumable state after iteration 1
    exports/0001/            the policy after iteration 1 in Hugging Face format

Each method leaves the directory in a state from which a run can be resumed, wherever it is killed. Any thread may call them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.protocols.store import Kind
from onlinerl.stores import _artefacts, _files, _tables
from onlinerl.stores._lock import Lock, caveat
from onlinerl.stores.rows import prompt_from_row, prompt_row
from onlinerl.types import Prompt

__all__ = ["RunDirectory"]

FORMAT = _files.FORMAT
READABLE = (1, 2, FORMAT)
KINDS: tuple[Kind, ...] = ("checkpoints", "exports")
_MANIFEST = "manifest.json"
_CONFIG = "config.yaml"
_LOCK = "lock"
_PROMPTS = "prompts"
_GIB = 1 << 30


class RunDirectory:
    """The run directory, open for writing and locked until `close`. Use `create` or `open`."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path = path
        self._lock = lock
        self._one_at_a_time = threading.RLock()
        self._closed = False
        self._journals_checked: set[tuple[int, str]] = set()

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
        lock = Lock(path / _LOCK)
        with _released_on_error(lock):
            run = cls(path, lock)
            if (path / _MANIFEST).exists():
                _require_same(path, run.manifest, manifest)
            else:
                _require_empty(path)
                _files.replace(path / _CONFIG, config_yaml.encode())
                started = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "attempt": 0}
                # Last: a directory without a manifest is not a run yet.
                _files.replace_json(path / _MANIFEST, {**started, "status": "running", **manifest})
            run._recover()
            return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Continue an existing run.

        Raises:
            StoreError: if there is no run, its manifest is damaged or of another format, or another process is writing to it.
        """
        path = Path(path)
        if not (path / _MANIFEST).is_file():
            raise _no_run(path)
        lock = Lock(path / _LOCK)
        with _released_on_error(lock):
            run = cls(path, lock)
            _require_readable(path, run.manifest)
            run._recover()
            return run

    @staticmethod
    def move_aside(path: str | Path) -> Path | None:
        """Rename an existing run to `<name>.1` (or the next free number) and return its new path; None if there is none.

        Raises:
            StoreError: if a process is still writing to it.
        """
        path = Path(path)
        if not path.exists():
            return None
        lock = Lock(path / _LOCK)
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
        return _files.read_json(self.path / _MANIFEST)

    def update_manifest(self, **changes: Any) -> None:
        """Replace some entries of the run's manifest, durably. What is written from here on has the present format."""
        with self._writing():
            _files.replace_json(self.path / _MANIFEST, {**self.manifest, "format": FORMAT, **changes})

    @property
    def caveat(self) -> str | None:
        """What to know about the lock where the run lies; None on a local disk."""
        return caveat(self.path)

    @property
    def config_yaml(self) -> str:
        """The configuration as it was written."""
        return (self.path / _CONFIG).read_text()

    def write_config(self, config_yaml: str) -> None:
        """Replace the stored configuration, for a resume that changes what may be changed."""
        _files.replace(self.path / _CONFIG, config_yaml.encode())

    def require_free(self, bytes_needed: int, min_free_bytes: int) -> None:
        """Refuse before anything is written if writing `bytes_needed` would leave less than `min_free_bytes` free.

        Raises:
            StoreError: with the numbers.
        """
        free = shutil.disk_usage(self.path).free
        if free - bytes_needed < min_free_bytes:
            raise StoreError(
                f"{self.path} has {free / _GIB:.2f} GiB free; {bytes_needed / _GIB:.2f} GiB are about to be written and "
                f"{min_free_bytes / _GIB:.2f} GiB must stay free",
                field="checkpoints.min_free_gib",
                fix="lower checkpoints.keep, set checkpoints.exports=last, free some space, or move the run to a larger disk "
                "(`runs`), then resume",
            )

    # --- prompts ---

    def keep_prompts(self, **sets: Sequence[Prompt]) -> None:
        """Store the prompts that this run uses (`train`, `heldout`), in order, and their hashes in the manifest."""
        folder = self.path / _PROMPTS
        self._make(folder)
        kept = {}
        for name, prompts in sets.items():
            rows = [prompt_row(prompt) for prompt in prompts]
            _tables.write(folder, name, rows)
            kept[name] = {"count": len(rows), "sha256": _digest(rows)}
        self.update_manifest(prompts=kept)  # last: before that, the run has no prompts of its own

    def prompts(self, name: str) -> list[Prompt] | None:
        """What `keep_prompts` stored; None if it has not been called.

        Raises:
            StoreError: if it is not what was stored.
        """
        kept = self.manifest.get("prompts")
        if kept is None:
            return None
        rows = _tables.read(self.path / _PROMPTS, name)
        if _digest(rows) != kept[name]["sha256"]:
            raise StoreError(
                f"{_tables.sealed_path(self.path / _PROMPTS, name)} does not hold the {kept[name]['count']} prompts of this run",
                field="runs",
                fix="restore it from a backup, or start a new run",
            )
        return [prompt_from_row(row) for row in rows]

    # --- iterations ---

    def iterations(self) -> list[int]:
        """Iterations of which anything is stored, ascending."""
        return sorted(int(p.name) for p in (self.path / "iterations").glob("[0-9]*") if p.name.isdigit())

    def append(self, iteration: int, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to a table; they are on the disk when this returns.

        Rows may hold tuples and numpy arrays (read back as lists). If this raises, none of the rows is in the table; if the
        process is killed meanwhile, some of the first ones may be.

        Raises:
            StoreError: if the table is sealed or the disk is full.
        """
        if not rows:
            return
        with self._writing():
            folder = self._open(iteration, table)
            journal = _tables.journal_path(folder, table)
            if (iteration, table) not in self._journals_checked:
                _files.cut_torn_tail(journal)
                self._journals_checked.add((iteration, table))
            try:
                _files.append_lines(journal, rows)
            except StoreError:
                self._journals_checked.discard((iteration, table))  # in case the failed write could not be taken back
                raise

    def read(self, iteration: int, table: str) -> list[dict[str, Any]]:
        """All rows of a table in the order in which they were appended; empty if there are none.

        Rows are the same before and after `seal`. A key that only other rows have is None.
        """
        with self._one_at_a_time:
            return _tables.read(self._folder(iteration), table)

    def sealed(self, iteration: int, table: str) -> bool:
        """True once the table is complete."""
        return _tables.sealed_path(self._folder(iteration), table).exists()

    def seal(self, iteration: int, table: str) -> None:
        """The table is complete: turn its journal into one Parquet file. May be called again."""
        with self._writing():
            folder = self._folder(iteration)
            self._make(folder)
            _tables.seal(folder, table)

    def write(self, iteration: int, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make `rows` the complete table, all of them or none. Rows may hold what `append` takes.

        For a table that is made at once: what a killed process left of an earlier attempt is replaced.

        Raises:
            StoreError: if the table is sealed or the disk is full.
        """
        with self._writing():
            _tables.write(self._open(iteration, table), table, rows)

    def finish_phase(self, iteration: int, phase: str, record: Mapping[str, Any]) -> None:
        """Mark a phase as done, durably. Numbers that are not finite are stored as null."""
        with self._writing():
            phases = self.phases(iteration)
            phases.pop(phase, None)  # a phase that is done again was finished last
            self._make(self._folder(iteration))
            _tables.update_manifest(self._folder(iteration), iteration=iteration, phases={**phases, phase: dict(record)})

    def phases(self, iteration: int) -> dict[str, dict[str, Any]]:
        """Finished phases and their records, in the order in which they finished."""
        return _tables.manifest(self._folder(iteration)).get("phases", {})

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

    def _open(self, iteration: int, table: str) -> Path:
        """The folder of a table that may still grow."""
        if self.sealed(iteration, table):
            raise StoreError(
                f"table {table!r} of iteration {iteration} is complete and takes no more rows",
                fix="look at the finished phases before appending",
            )
        self._make(self._folder(iteration))
        return self._folder(iteration)

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
            for leftover in [*self.path.glob(f".*{_files.TEMPORARY}"), *self.path.glob(f"iterations/*/.*{_files.TEMPORARY}")]:
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


def _require_readable(path: Path, manifest: Mapping[str, Any]) -> None:
    found = manifest.get("format")
    if found not in READABLE:
        raise StoreError(
            f"{path} has format {found!r}, this version of onlinerl reads {' and '.join(map(str, READABLE))}",
            field="name",
            fix="resume it with the version that wrote it, or start a new run",
        )
    lacking = [k for k, kind in (("name", str), ("fingerprint", dict)) if not isinstance(manifest.get(k), kind)]
    if lacking:
        raise _files.damaged(path / _MANIFEST, f"it does not say {' and '.join(lacking)} of the run")


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if stored.get("config_digest") == wanted.get("config_digest"):
        return
    before, now = stored.get("fingerprint") or {}, wanted.get("fingerprint") or {}
    changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    differs = f"; it differs in {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}" if changed else ""
    raise StoreError(
        f"{path} already holds a different run{differs}",
        field="name",
        fix="give the new run another `name`, or set the old one aside with --fresh",
    )


def _require_empty(path: Path) -> None:
    ours = {_LOCK, _CONFIG}  # what a crash during `create` may have left
    others = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(_files.TEMPORARY))
    if others:
        raise StoreError(
            f"{path} holds files but no run ({', '.join(others[:3])})",
            field="name",
            fix="give the run another `name`, or empty it",
        )


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps(row, sort_keys=True).encode())
    return hasher.hexdigest()


def _no_run(path: Path) -> StoreError:
    runs = sorted(p.parent.name for p in path.parent.glob(f"*/{_MANIFEST}"))
    known = f"runs in {path.parent}: {', '.join(runs)}" if runs else f"{path.parent} holds no run at all: check `runs`"
    return StoreError(f"{path} holds no run", field="name", fix=f"{known} (`ls {path.parent}` lists them)")
