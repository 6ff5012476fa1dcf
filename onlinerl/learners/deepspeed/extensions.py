"""The lock of extensions that PyTorch compiles at first use, which nobody takes away when the process that compiled was killed.

DeepSpeed has such an extension for CPU ranks. PyTorch makes a file when it begins to compile and removes it when it has compiled;
whoever finds it waits until it is gone. A run that is killed in between leaves it behind, and all later ones would wait for ever.
Whoever compiles has the file open: one that nobody has open belongs to nobody.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
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


def use_own_folder() -> None:
    """Compile into a folder of this Python environment. What PyTorch builds names the environment's paths: environments that share a
    folder, as they do by default, compile everything anew whenever they take turns."""
    name = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(get_default_build_root()) / f"environment-{name}"))


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
    abandoned = [lock for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock") if _is_abandoned(lock)]
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
