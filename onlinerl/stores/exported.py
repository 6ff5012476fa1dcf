"""The iterates of a run as models on disk, found without its lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onlinerl.errors import StoreError
from onlinerl.stores import _artefacts, _files

FOLDER, MANIFEST = "exports", _artefacts.MANIFEST


def newest(run: Path) -> int:
    """The newest iterate that was exported, 0 if none was."""
    return max(_artefacts.numbers(run / FOLDER), default=0)


def iterate(run: Path, number: int) -> Path:
    """An iterate in Hugging Face format, after every byte of it was compared with its checksum.

    Raises:
        StoreError: if it was not kept, or is damaged.
    """
    kept = _artefacts.numbers(run / FOLDER)
    if number not in kept:
        raise StoreError(
            f"{run} has no export of iterate {number}",
            field="exports",
            fix=f"choose one of {', '.join(map(str, kept))}; checkpoints.exports says which are kept"
            if kept
            else "wait until the first iteration is trained",
        )
    return _artefacts.verified(run / FOLDER, number)


def base(run: Path) -> Mapping[str, str]:
    """What the base model of a run was recognised by when it started."""
    found: Mapping[str, str] = _files.read_json(run / "manifest.json").get("reference") or {}
    return found
