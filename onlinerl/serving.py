"""`vllm serve` as a process of our own, which ends with whoever started it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULE = "onlinerl.engines.openai.server"
"""What the process runs: vLLM's server, and a look at whether its parent is still there."""
END_S = 15.0
_LAST_WORDS = 1500


class Server:
    """A process that listens on a socket in a folder that only this user can look into.

    Not on a port: whoever can reach the endpoints that change weights can change them, and vLLM asks for no key there.

    Args:
        options: of `vllm serve`, by their names.
        environment: variables that it gets beside those of this process.
        logged: whether what it writes is kept for `last_words`, instead of going where this process writes.
    """

    def __init__(
        self, options: Mapping[str, Any], *, environment: Mapping[str, str] | None = None, logged: bool = False
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="onlinerl-"))
        self.socket = str(self._folder / "socket")
        self._options, self._environment, self._logged = options, environment, logged
        self.start()

    def start(self) -> None:
        """Start it, again where it has ended, on the same socket."""
        Path(self.socket).unlink(missing_ok=True)
        command = [sys.executable, "-m", MODULE, *arguments({**self._options, "uds": self.socket})]
        environment = None if self._environment is None else {**os.environ, **self._environment}
        if not self._logged:
            self._process = subprocess.Popen(command, env=environment)
            return
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def gone(self) -> str | None:
        """How it ended, if it has."""
        code = self._process.poll()
        return None if code is None else f"the server of this replica ended with exit code {code}"

    def last_words(self) -> str:
        """The end of what it wrote, if that is kept."""
        try:
            return (self._folder / "log").read_text(errors="replace")[-_LAST_WORDS:].strip()
        except OSError:
            return ""

    def end(self) -> None:
        """End it, and what it has started."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line of `vllm serve` with these options, by vLLM's own names."""
    written = []
    for name, value in {**options, "disable_uvicorn_access_log": True, "uvicorn_log_level": "warning"}.items():
        key = name.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{key}" if value else f"--no-{key}")
        else:
            written.append(f"--{key}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return written
