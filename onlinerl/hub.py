"""Models by their hub id: which of them are on this machine. Fetches nothing."""

from __future__ import annotations

import re
from pathlib import Path

from onlinerl.config import at_home


def is_id(model: str) -> bool:
    """Whether it can be the id of a model on a hub, such as org/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not model.startswith(("models/", "."))


def local(model: str) -> Path | None:
    """Where the files of a model lie: its directory, or the snapshot of a hub id that has been downloaded."""
    path = at_home(model, "model")
    if path.is_dir():
        return path.absolute()
    if not is_id(model):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    whole = (snapshot / "config.json").is_file() and any(snapshot.glob("*.safetensors"))
    return snapshot if whole else None
