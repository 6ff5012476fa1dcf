"""One writer per run: a lock that the kernel releases when its process dies, however it dies.

It is taken with flock(2). On a local disk that is all there is to say. On a network file system it depends on how it is mounted:

- NFS: Linux passes flock to the server as a lock over the whole file, so it holds between machines, unless the mount has `nolock`,
  `local_lock=flock` or `local_lock=all`: then it holds between processes of one machine only. When the server or the network
  fails, a lock may be lost (NFSv4: after the lease, 90 s as a rule) or stay behind until the server notices that its owner is gone.
- Lustre: between machines with the mount option `flock`, on one machine only with `localflock`, and otherwise not at all.
- SMB, and file systems in user space (sshfs and others): as the server or the driver decides; often on one machine only.

`caveat` says so for a given directory. Whatever the lock does, only one machine may resume a run at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path

from onlinerl.errors import StoreError
from onlinerl.mounts import network_mount
from onlinerl.stores import _files

_PATIENCE_S = 0.5
_LOCAL_ONLY = re.compile(r"\b(nolock|local_lock=(flock|all)|localflock)\b")
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


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


def caveat(path: Path) -> str | None:
    """What to know about locks where `path` lies; None on a local disk."""
    mount = network_mount(path)
    if mount is None:
        return None
    kind, options = mount
    if local := _LOCAL_ONLY.search(options):
        return (
            f"{path} is on {kind}, mounted with {local[0]}: the lock of a run holds on this machine only; "
            "never resume it on two machines at once"
        )
    return (
        f"{path} is on {kind}: the lock of a run holds between machines only if the server passes locks on; "
        "never resume it on two machines at once"
    )


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
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise StoreError(
                f"the file system of the run takes no locks: {error.strerror}",
                field="runs",
                fix="mount it with locks (Lustre: `flock`; NFS: a running lock service), or set `runs` to another disk",
            ) from error
        raise
    return True
