"""The lock of extensions that PyTorch compiles at first use, which nobody takes away when the process that compiled was killed.

DeepSpeed has such an extension for CPU ranks. PyTorch makes a file when it begins to compile and removes it when it has compiled;
whoever finds it waits until it is gone. A run that is killed in between leaves it behind, and all later ones would wait for ever.
Whoever compiles has the file open: one that nobody has open belongs to nobody.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from onlinerl.mounts import network_mount

LOOK_S = 2.0
PATIENCE_S, NETWORK_PATIENCE_S = 60.0, 600.0
"""Youngest lock that is taken for abandoned. Processes of other machines and containers cannot be seen from here, and may compile for
that long: on a network file system there may be such machines."""


@contextmanager
def without_abandoned_locks() -> Iterator[None]:
    """While the block runs, locks that belong to nobody are removed, also those that are abandoned only then."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            remove_abandoned_locks()

    remove_abandoned_locks()
    threading.Thread(target=watch, name="extension locks", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def remove_abandoned_locks() -> list[Path]:
    """Remove them; returns which they were."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    depth = "*/lock" if os.environ.get("TORCH_EXTENSIONS_DIR") else "*/*/lock"
    abandoned = [lock for lock in root.glob(depth) if _is_abandoned(lock)]
    for lock in abandoned:
        logging.getLogger(__name__).warning("%s was left behind by a process that was killed; it is removed", lock)
        lock.unlink(missing_ok=True)
    return abandoned


def _is_abandoned(lock: Path) -> bool:
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:  # released meanwhile
        return False
    patience = PATIENCE_S if network_mount(lock) is None else NETWORK_PATIENCE_S
    return age > patience and not _is_open(lock)


def _is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open, as far as this user may see."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has ended, or is another user's
            if descriptor.samefile(path):
                return True
    return False
