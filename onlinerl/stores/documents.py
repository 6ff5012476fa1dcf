"""Single JSON documents of a run directory, with a checksum, there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onlinerl.stores import _files


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace it, durably. Numbers that are not finite become null.

    Raises:
        StoreError: if it cannot be written.
    """
    _files.replace_json(path, document)


def read(path: Path) -> dict[str, Any] | None:
    """What was written; None if nothing was.

    Raises:
        StoreError: if it is damaged.
    """
    return _files.read_json(path) if path.exists() else None
