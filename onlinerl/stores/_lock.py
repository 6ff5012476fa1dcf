"""One writer per run: a lock that the kernel releases when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from onlinerl.errors import StoreError
from onlinerl.stores import _files

_PATIENCE_S = 0.5


class Lock:
    """Held from construction until `release`.

    The file stays behind on purpose: removing it would let two processes hold locks on two files of the same name.

    Raises:
        StoreError: if another process holds it; the message names that process.
    """

    def __init__(self, path: Path) -> None:
        with _files.explained(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._acquire(path)
            except (OSError, StoreError):
                self.release()
                raise

    def _acquire(self, path: Path) -> None:
        # `held` takes the lock for an instant to look at it, so one refusal does not mean that there is an owner.
        deadline = time.monotonic() + _PATIENCE_S
        while not _try(self._descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                owner = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise StoreError(
                    f"{path.parent} is in use by {owner}",
                    field="name",
                    fix="wait for that process or stop it, or give this run another `name`",
                )
            time.sleep(0.02)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def held(path: Path) -> bool:
    """True if some process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
