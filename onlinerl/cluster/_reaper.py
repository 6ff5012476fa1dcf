"""Ends what Ray leaves behind.

When a controller is killed, Ray's node notices it and ends itself and its workers at once, but the node's agents first try to report to
the control service, which is gone too, for a minute. And a worker that is killed leaves its children, such as the compiler of DeepSpeed's
extension.

    python -m onlinerl.cluster._reaper PID
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

POLL_S = 2.0
GRACE_S = 5.0
"""For what ends by itself."""


def start(pid: int) -> subprocess.Popen[bytes]:
    """Watch over process `pid` from a process and session of its own, so that no signal to the controller's group reaches it."""
    return subprocess.Popen(
        [sys.executable, "-m", "onlinerl.cluster._reaper", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(pid: int) -> None:
    """Return when process `pid` has ended, or says by SIGTERM that its own Ray node has, and every process that the node had started."""
    known: set[psutil.Process] = set()
    is_over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_over.set())
    with suppress(psutil.NoSuchProcess):
        controller = psutil.Process(pid)
        while controller.is_running() and controller.status() != psutil.STATUS_ZOMBIE and not is_over.is_set():
            for child in controller.children():
                with suppress(psutil.NoSuchProcess):
                    if child.name() == "raylet":
                        known.update(child.children(recursive=True))
            is_over.wait(POLL_S)
    _, left = psutil.wait_procs(known, timeout=GRACE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):  # psutil refuses to signal another process that got the same number
            process.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]))
