"""No process of a run outlives the run."""

from __future__ import annotations

import os
import signal
import threading
import time

_watching = threading.Lock()


def die_with_parent(poll_s: float = 1.0) -> None:
    """Kill this process soon after its parent has died, however the parent died.

    A polling thread rather than PR_SET_PDEATHSIG: the kernel's signal follows the parent's *thread*, which may end early, and it
    exists on Linux only. Calling it again does nothing.
    """
    if not _watching.acquire(blocking=False):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()
