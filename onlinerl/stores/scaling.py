"""A wish for another number of replicas, left in the directory of a run that is under way for its controller to find."""

from __future__ import annotations

from pathlib import Path

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


def wished(run: Path) -> int | None:
    """The wish; None if there is none.

    Raises:
        StoreError: if it is damaged; it is gone then, and can be left again.
    """
    path = run / _FILE
    try:
        return int(_files.read_json(path)["replicas"])
    except FileNotFoundError:
        return None
    except StoreError as error:
        forget(run)
        fix = f"it is removed: resume the run, and ask again with `onlinerl scale {run} --replicas N`"
        raise StoreError(error.cause, field="RUN", fix=fix) from error


def forget(run: Path) -> None:
    """There is no wish any more."""
    (run / _FILE).unlink(missing_ok=True)


def take(run: Path) -> int | None:
    """The wish, once; None if there is none."""
    wish = wished(run)
    if wish is not None:
        forget(run)
    return wish
