"""A sweep is a folder of ordinary runs, and one file that says which they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.stores import _files

FILE = "sweep.json"
LOCK = "sweep.lock"


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """What a sweep consists of, and what is not written in the runs themselves."""

    name: str
    file: str
    """The sweep file that it was started from."""
    runs: Mapping[str, Mapping[str, str]]
    """By name of the run: what it has on each axis, in words."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Combinations that are left out because `check` refuses them, and why."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Runs that failed when they were tried last, and why."""

    def write(self, folder: Path) -> None:
        """Durably."""
        _files.replace_json(folder / FILE, asdict(self))


def read(folder: Path) -> SweepRecord | None:
    """The record in a folder; None if it holds no sweep.

    Raises:
        StoreError: if it is damaged.
    """
    try:
        found: dict[str, Any] = _files.read_json(folder / FILE)
    except FileNotFoundError:
        return None
    found.pop("format", None)
    try:
        return SweepRecord(**found)
    except TypeError:
        raise StoreError(
            f"{folder / FILE} is not the record of a sweep", field="name", fix="remove it; the runs beside it stay as they are"
        ) from None
