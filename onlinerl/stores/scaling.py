"""A wish for another number of replicas, left in the directory of a run that is under way for its controller to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.stores import _files, _lock

_FILE = "scale.json"


def ask(run: Path, replicas: int) -> None:
    """Leave the wish; a later one takes the place of an earlier one that nobody has seen yet.

    Raises:
        StoreError: if the run is not under way, so that nobody would see it.
    """
    if not _lock.held(run / "lock"):
        raise StoreError(
            f"{run} is not running",
            field="RUN",
            fix=f"start it with as many: onlinerl resume {run} engine.replicas={replicas}",
        )
    _files.replace_json(run / _FILE, {"replicas": replicas})


def take(run: Path) -> int | None:
    """The wish, once; None if there is none."""
    path = run / _FILE
    if not path.exists():
        return None
    wish: dict[str, Any] = _files.read_json(path)
    path.unlink()
    return int(wish["replicas"])
