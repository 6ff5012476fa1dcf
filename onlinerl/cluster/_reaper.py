"""Ends what Ray leaves behind when a controller is killed.

Ray's node notices the death of the controller that started it and ends itself and its workers at once, but the node's agents first
try to report to the control service, which is gone too, for a minute.

    python -m onlinerl.cluster._reaper PID
"""

from __future__ import annotations

import subprocess
import sys
import time
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
    """Return when process `pid` has ended, and with it every process that its own Ray node had started."""
    known: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        controller = psutil.Process(pid)
        while controller.is_running() and controller.status() != psutil.STATUS_ZOMBIE:
            for child in controller.children():
                with suppress(psutil.NoSuchProcess):
                    if child.name() == "raylet":
                        known.update(child.children(recursive=True))
            time.sleep(POLL_S)
    time.sleep(GRACE_S)
    for process in known:
        with suppress(psutil.NoSuchProcess):  # psutil refuses to signal another process that got the same number
            process.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]))
