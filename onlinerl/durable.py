"""Writes that are on the disk when they return, and what is said when the system refuses them or a file cannot be trusted."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from onlinerl.errors import StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_full(error: OSError) -> bool:
    """True if the error means that the disk or a quota is full."""
    return error.errno in _FULL


def disk_full(path: Path) -> StoreError:
    """The error for a full disk."""
    return StoreError(
        f"the disk is full while writing {path}; everything that was finished before is safe and readable",
        field="runs",
        fix="free some space (checkpoints.keep and checkpoints.exports say how much a run keeps), then resume: the run "
        "continues at the first unfinished phase",
    )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write below `path` into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from error
        if error.errno in _FORBIDDEN:
            raise StoreError(
                f"{path} cannot be written: {error.strerror}",
                field="runs",
                fix="give write permission, or set `runs` to a directory that you may write to",
            ) from error
        raise StoreError(
            f"{path} cannot be written: {error}", field="runs", fix="check the disk and the path, then resume the run"
        ) from error


def write_all(descriptor: int, pieces: Sequence[bytes]) -> None:
    """Write every byte of all pieces, with one call if the system takes them all, and wait until the disk has them."""
    left = [memoryview(piece) for piece in pieces if piece]
    while left:
        written = os.writev(descriptor, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
    os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, pieces: Sequence[bytes], *, at: int) -> None:
    """Add bytes to a file that holds `at` bytes by now; they are on the disk when this returns, and not in the file if it raises.

    What a crash left behind those bytes is cut off first.
    """
    with explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            if os.fstat(descriptor).st_size > at:
                os.ftruncate(descriptor, at)
            os.lseek(descriptor, at, os.SEEK_SET)
            try:
                write_all(descriptor, pieces)
            except OSError:
                # Otherwise a caller that tries again would find its rows twice.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, at)
                raise
        finally:
            os.close(descriptor)
        if at == 0:
            sync_directory(path.parent)


def damaged(
    path: Path, why: str, fix: str = "restore the file from a backup, or set the run aside and start it afresh"
) -> StoreError:
    """The error for a file that cannot be trusted."""
    return StoreError(f"{path} is damaged or cannot be read: {why}", field="runs", fix=fix)
