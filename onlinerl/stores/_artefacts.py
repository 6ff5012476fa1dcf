"""Numbered directories of files (checkpoints, exports) that exist completely or not at all.

A directory is written under a temporary name, described by `complete.json` (size and SHA-256 of every file), flushed to the disk and
renamed. Whatever lacks a valid `complete.json` is not there as far as anybody else is concerned.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.stores import _files

MANIFEST = "complete.json"
"""Of each directory: size and SHA-256 of every other file in it."""
_REPLACED = ".old"
_THREADS = 4
"""Hash this many files at a time."""
_ENDS = "ends:"
_ENDS_BYTES = 32 << 20
"""In format 1, of a file above 64 MiB only the first and the last 32 MiB were hashed; the checksum begins with this word."""


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


def require_files(path: Path, written: Mapping[str, int]) -> None:
    """Refuse an artefact that lacks anything of what was written to it: `written` holds the bytes of each file, by relative path.

    Raises:
        StoreError: naming the file.
    """
    for name, size in written.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise StoreError(
                f"{file} was written with {size} bytes, and {'is not there' if found is None else f'has {found}'}",
                field="runs",
                fix="learner and controller must see the same directory: put the run on a disk that all nodes share",
            )


def find(folder: Path, number: int) -> Path | None:
    """Artefact `number`, or None unless all its files are there with their sizes."""
    path = folder / f"{number:04d}"
    try:
        whole = all((path / name).stat().st_size == entry["bytes"] for name, entry in _entries(path).items())
    except (StoreError, OSError):
        return None
    return path if whole else None


def verified(folder: Path, number: int) -> Path:
    """Artefact `number`, after every byte of it was compared with its checksum.

    Raises:
        StoreError: naming the file that is missing or damaged.
    """
    path = folder / f"{number:04d}"
    if not path.is_dir():
        raise StoreError(f"{path} is not there", field="runs")
    try:
        entries = _entries(path)
        for name, entry in entries.items():
            if (path / name).stat().st_size != entry["bytes"]:
                raise _files.damaged(path / name, f"it had {entry['bytes']} bytes and has {(path / name).stat().st_size}")
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda name: _checksum(path / name, entries[name]["sha256"]), entries)
            for (name, entry), checksum in zip(entries.items(), found, strict=True):
                if checksum != entry["sha256"]:
                    raise _files.damaged(path / name, "its content does not agree with its checksum")
    except FileNotFoundError as error:
        raise _files.damaged(Path(error.filename), "it is not there") from error
    except OSError as error:
        raise _files.damaged(path, str(error)) from error
    return path


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by relative path."""
    files = _files.read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()):
        raise _files.damaged(path / MANIFEST, "it does not list the files")
    return files


def numbers(folder: Path) -> list[int]:
    """Numbers of all complete artefacts, ascending."""
    named = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
    return [n for n in named if find(folder, n)]


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
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = list(pool.map(_checksum, files))
    entries = {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": checksum}
        for file, checksum in zip(files, checksums, strict=True)
    }
    _files.replace_json(path / MANIFEST, {"files": entries})
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


def _checksum(path: Path, like: str = "") -> str:
    """SHA-256 of a file, taken in the way in which the checksum `like` was."""
    with path.open("rb") as file:
        if not like.startswith(_ENDS):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(_ENDS_BYTES))
        file.seek(-_ENDS_BYTES, os.SEEK_END)
        digest.update(file.read())
    return f"{_ENDS}{digest.hexdigest()}"
