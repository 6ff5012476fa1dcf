"""metrics.jsonl: every figure with its error bar, one JSON object per line. The source of truth; all other trackers are views.

The file is only ever appended to. What a resumed run measures again is written again; `read_metrics` lets the newer record
supersede the older one instead of mixing the two.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onlinerl.errors import ConfigError, StoreError
from onlinerl.protocols.tracker import Tracked, Tracker, TrackerConfig
from onlinerl.types import Metric

__all__ = ["Jsonl", "JsonlTracker", "caveats", "read_metrics"]

_NEEDED: Mapping[str, Any] = {"name": str, "value": int | float | None, "iteration": int, "attempt": int, "labels": dict}
"""What a record must hold to be read."""


class Jsonl(TrackerConfig):
    """metrics.jsonl in the run directory, which every run has."""

    name: str = "jsonl"

    def check(self) -> None:
        """Nobody has to ask for it."""
        raise ConfigError("is what every run has", field="metrics.trackers", fix="leave it out")

    def open(self, run: Tracked) -> JsonlTracker:
        """Begin or go on with the file."""
        return JsonlTracker(run.directory / "metrics.jsonl")


class JsonlTracker(Tracker):
    """Appends metrics to a file. Records outlive a killed process at once, and a power cut after the phase they belong to.

    Raises:
        StoreError: if the file cannot be written; a run whose figures are lost is not worth its machines.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            if not _ends_with_newline(self._path):  # a killed process left half a line: ours must not be joined to it
                self._file.write(b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def log(self, metrics: Iterable[Metric]) -> None:
        """Append one line per metric."""
        lines = "".join(json.dumps(_record(m), allow_nan=False) + "\n" for m in metrics).encode()
        try:
            while lines:
                lines = lines[self._file.write(lines) or 0 :]
        except OSError as error:
            raise self._failed(error) from error

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """Put what was written so far on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()

    def _failed(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._path} cannot be written: {error}",
            field="runs",
            fix="free some space or check the path, then resume the run",
        )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The valid records of a metrics file: per name, labels and iteration the last one of the highest attempt.

    Empty if there is no file. Lines that a killed process left unfinished are skipped, and so are damaged ones: figures are for
    people, and no run depends on them.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    latest: dict[tuple[object, ...], dict[str, Any]] = {}
    for line in lines:
        record = _parse(line)
        if record is None:
            continue
        key = (record["name"], tuple(sorted(record["labels"].items())), record["iteration"])
        known = latest.get(key)
        if known is None or record["attempt"] >= known["attempt"]:
            latest.pop(key, None)  # keeps the order of the file
            latest[key] = record
    return list(latest.values())


def caveats(path: str | Path, finished: Mapping[int, Collection[str]]) -> list[str]:
    """What is wrong with the metrics file of a run that goes on: figures that it has lost. Call it before the file is opened.

    Args:
        path: of the file.
        finished: the phases that are finished, by iteration: each of them has logged how long it took.
    """
    path = Path(path)
    said = []
    known = {record["iteration"] for record in read_metrics(path)}
    # The last phase that finished may have been killed before it could log anything.
    if lost := [str(t) for t, phases in finished.items() if t not in known and len(phases) > 1]:
        gone = "has no" if path.exists() else "is gone, and with it the"
        said.append(
            f"{path} {gone} figures of iteration{'s' * (len(lost) > 1)} {', '.join(lost)}. They are not computed again: to have them in "
            "plots and totals, add the lines of a backup to it. The table of `onlinerl show` has its figures from elsewhere, and lacks nothing"
        )
    torn = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    if torn and _parse(torn) is None:
        said.append(f"the last line of {path} was cut short: that figure is skipped, and the file goes on behind it")
    return said


def _record(metric: Metric) -> dict[str, Any]:
    return {key: _strict(value) for key, value in asdict(metric).items()}


def _strict(value: Any) -> Any:
    """JSON knows no NaN; null says that the figure could not be measured."""
    if isinstance(value, Mapping):
        return {str(k): str(v) for k, v in value.items()}
    if hasattr(value, "item"):  # numpy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(key, ...), kind) for key, kind in _NEEDED.items())
    return record if whole else None
