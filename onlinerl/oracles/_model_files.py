"""The files of a model that an oracle loads: where they are, what is wrong with them, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onlinerl import hub
from onlinerl.config import at_home
from onlinerl.errors import OracleError

_BLOCKS, _BLOCK_BYTES = 64, 64 * 1024
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def absolute(path: str, key: str) -> str:
    """The whole path of a directory; a hub id as it is. A resume may start in another working directory."""
    folder = at_home(path, f"oracle.{key}")
    return str(folder.absolute()) if folder.is_dir() else path


def folder_of(key: str, path: str) -> Path:
    """The directory of a model, downloaded if need be.

    Raises:
        OracleError: if it is neither here nor to be had.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # bad ids, network errors and missing repositories are all one of these
        raise OracleError(
            f"{path!r} is neither a directory nor a model that can be downloaded: {error}",
            field=f"oracle.{key}",
            fix=f"check the path; relative paths start where onlinerl was started, and a hub id is fetched first with `hf download {path}`",
        ) from error


def device_and_dtype(device: str, dtype: str) -> tuple[str, Any]:
    """Where a model is put, and torch's type of its weights, of what `oracle.device` and `oracle.dtype` say.

    Raises:
        OracleError: if there is no GPU and one is asked for.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise OracleError("there is no GPU here", field="oracle.device", fix="set oracle.device to cpu or auto")
    found = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    name = {"cpu": "float32", "cuda": "bfloat16"}[found] if dtype == "auto" else dtype
    return found, getattr(torch, name)


@contextmanager
def readable(key: str, path: str, what: str = "language model") -> Iterator[None]:
    """Say it as an OracleError where transformers cannot read a model."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise OracleError(
            f"cannot load a {what} and its tokenizer from {path}: {error}",
            field=f"oracle.{key}",
            fix="give a directory that save_pretrained wrote for model and tokenizer, with safetensors weights, such as exports/0001 of a run",
        ) from error


def _samples(file: Path) -> Iterator[bytes]:
    """The whole of a small file, evenly spread blocks of a large one."""
    size = file.stat().st_size
    if size <= _BLOCKS * _BLOCK_BYTES:
        yield file.read_bytes()
        return
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
            yield stream.read(_BLOCK_BYTES)


def absent(paths: Mapping[str, str]) -> str | None:
    """The first hub id that has not been downloaded."""
    return next((path for path in paths.values() if hub.is_id(path) and hub.local(path) is None), None)


def digest(paths: Mapping[str, str], said: Mapping[str, object]) -> str:
    """Of the files of models and tokenizers, by their keys, and of what else is said. Of a large file, evenly spread samples."""
    found = hashlib.sha256(repr(sorted(said.items())).encode())
    for key, path in paths.items():
        folder = folder_of(key, path)
        for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
            found.update(f"\0{key}\0{file.name}\0{file.stat().st_size}\0".encode())
            for block in _samples(file):
                found.update(block)
    return found.hexdigest()[:12]
