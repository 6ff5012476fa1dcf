"""Files by which Prometheus finds runs and learns how they ended, all in one folder, `<runs>/.prometheus`.

`NAME.json` (file_sd) says where a run listens and, as the target's label `run_state`, how it stands. A run that has finished has none;
one that failed or was interrupted keeps it, marked, until it is resumed; one that was killed could not mark it, and does not answer.

`NAME.prom` holds the last figures of a run that has ended, for node_exporter's textfile collector: nobody can scrape a process that is
gone, and a failure is often the last thing that it exported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class Discovery:
    """The files of one run.

    Args:
        folder: made if it is missing.
        run: name of the run.
        target: HOST:PORT that a scraper reaches the run at.
    """

    def __init__(self, folder: Path, run: str, target: str) -> None:
        self._target, self._labels = target, {"run": run}
        self._discovered, self._last = folder / f"{run}.json", folder / f"{run}.prom"
        folder.mkdir(parents=True, exist_ok=True)

    def started(self) -> None:
        """The run can be scraped; what an earlier attempt left behind is no longer true."""
        self._last.unlink(missing_ok=True)
        self._mark("running")

    def ended(self, state: str, figures: bytes) -> None:
        """The run can no longer be scraped: leave its last figures, in Prometheus' text format."""
        _replace(self._last, figures)
        if state == "finished":
            self._discovered.unlink(missing_ok=True)
        else:
            self._mark(state)

    def _mark(self, state: str) -> None:
        entry = [{"targets": [self._target], "labels": {**self._labels, "run_state": state}}]
        _replace(self._discovered, json.dumps(entry).encode())


def _replace(path: Path, content: bytes) -> None:
    """At once, so that nobody reads half of it; the other name matches no pattern that is read."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)
