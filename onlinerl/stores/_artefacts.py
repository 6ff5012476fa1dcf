"""Numbered directories of files (checkpoints, exports) that exist completely or not at all (R-D4).

A directory is written under a temporary name, described by `complete.json`, flushed to the disk and renamed. Whatever lacks a valid
`complete.json` is not there as far as anybody else is concerned, and is removed when the run is opened again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.stores import _files

_MANIFEST = "complete.json"
_REPLACED = ".old"
_HASHED_WHOLE = 64 << 20


@contextlib.contextmanager
def staged(folder: Path, number: int) -> Iterator[Path]:
    """A temporary directory to write to; it becomes artefact `number` when the block ends without an exception."""
    final, temporary, replaced = (
        folder / f"{number:04d}",
        _hidden(folder, number, _files.TEMPORARY),
        _hidden(folder, number, _REPLACED),
    )
    with _files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
    try:
        yield temporary
        with _files.explained(final):
            _finish(temporary)
            if final.exists():
                _remove(replaced)
                final.rename(replaced)
            temporary.rename(final)
            _files.sync_directory(folder)
            _remove(replaced)
    except OSError as error:  # only from the block itself: ours are StoreErrors by now
        if _files.is_full(error):
            raise _files.disk_full(final) from error
        raise
    finally:
        # Nothing may hide the reason for which the block failed; a leftover is removed at the next start.
        with contextlib.suppress(OSError):
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            _remove(temporary)


def recover(folder: Path) -> None:
    """Bring order into what a crash left behind."""
    for entry in sorted(folder.glob(".*")):
        final = folder / entry.name[1:].split(".")[0]
        if entry.name.endswith(_REPLACED) and not final.exists():
            entry.rename(final)  # the crash came between the two renames, and the new one was not promised to anybody
        else:
            _remove(entry)


def find(folder: Path, number: int, *, verify: bool) -> Path | None:
    """Artefact `number`, or None unless it is complete."""
    path = folder / f"{number:04d}"
    try:
        files: dict[str, Any] = _files.read_json(path / _MANIFEST)["files"]
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return None
            if verify and _checksum(path / name) != entry["sha256"]:
                return None
    except (StoreError, OSError, KeyError, TypeError, AttributeError):  # not a valid manifest, or a file is gone
        return None
    return path


def numbers(folder: Path) -> list[int]:
    """Numbers of all complete artefacts, ascending."""
    named = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
    return [n for n in named if find(folder, n, verify=False)]


def retain(folder: Path, keep: set[int]) -> None:
    """Remove every artefact that is not in `keep`."""
    for path in sorted(p for p in folder.glob("[0-9]*") if p.name.isdigit() and int(p.name) not in keep):
        with _files.explained(path):
            # Renamed first, so that one removed by half is never taken for a whole one.
            doomed = _hidden(folder, int(path.name), _files.TEMPORARY)
            _remove(doomed)
            path.rename(doomed)
            _remove(doomed)


def _hidden(folder: Path, number: int, suffix: str) -> Path:
    return folder / f".{number:04d}{suffix}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finish(path: Path) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise StoreError(
            f"nothing was written to {path}",
            field="runs",
            fix="learner and controller must see the same directory: put the run on a disk that all nodes share",
        )
    for file in files:
        _sync_file(file)
    entries = {str(f.relative_to(path)): {"bytes": f.stat().st_size, "sha256": _checksum(f)} for f in files}
    _files.replace_json(path / _MANIFEST, {"files": entries})
    for directory in (d for d in path.rglob("*") if d.is_dir()):
        _files.sync_directory(directory)
    _files.sync_directory(path)


def _sync_file(path: Path) -> None:
    # Flushes what other processes (the learner's ranks) wrote to the file, too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    """SHA-256 of the whole file; of a file above 64 MiB, of its first and last 32 MiB, and the result says so.

    The file's size is recorded beside it. A write that a crash cut short changes the size or the end of the file; hashing tens of
    gigabytes at every save would cost more than it finds.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(_HASHED_WHOLE // 2))
        file.seek(-_HASHED_WHOLE // 2, os.SEEK_END)
        digest.update(file.read())
    return f"ends:{digest.hexdigest()}"
