"""`vllm serve`, as one replica starts it for itself; run as a module it is the server's own process, which ends with its parent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onlinerl.engines import _fit, _vllm
from onlinerl.processes import die_with_parent
from onlinerl.protocols.engine import Place, ReplicaSettings

if TYPE_CHECKING:
    from onlinerl.engines.openai import OpenAI

MODEL = "policy"
"""What the server calls its model."""
END_S = 15.0


class OwnServer:
    """A process that listens on a socket in a folder that only this user can look into.

    Not on a port: whoever can reach the endpoints that change weights can change them, and vLLM asks for no key there.

    Args:
        model: directory of the base model.
        config: the engine section.
        places: where all replicas run.
        index: of this one.
        settings: what else it is told.
    """

    def __init__(self, model: str, config: OpenAI, places: Sequence[Place], index: int, settings: ReplicaSettings) -> None:
        if settings.device == "cpu":
            _vllm.bind(_fit.share_cores(places, index, config))
        self._folder = Path(tempfile.mkdtemp(prefix="onlinerl-"))
        self.socket = str(self._folder / "socket")
        command = [sys.executable, "-m", __name__, *options(model, config, settings, self.socket)]
        self._process = subprocess.Popen(command)

    def gone(self) -> str | None:
        """How it ended, if it has."""
        code = self._process.poll()
        return None if code is None else f"the server of this replica ended with exit code {code}"

    def end(self) -> None:
        """End it, and what it has started."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def options(model: str, config: OpenAI, settings: ReplicaSettings, socket: str) -> list[str]:
    """What the server is given on its command line: all that a replica's process would be, and where to listen."""
    of_engine = _vllm.arguments(model, config, settings)
    of_server = {
        "uds": socket,
        "served_model_name": MODEL,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    written = []
    for name, value in {**of_engine, **of_server}.items():
        key = name.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{key}" if value else f"--no-{key}")
        else:
            written.append(f"--{key}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return written


def main() -> None:
    """Serve."""
    die_with_parent()
    # Not the command `vllm` itself: it asks for the version of a package of that name, and vLLM for CPUs has another.
    from vllm.entrypoints.launchers.api_server import entry

    entry.main()


if __name__ == "__main__":
    main()
