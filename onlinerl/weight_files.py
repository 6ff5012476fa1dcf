"""What the files of a model's weights say about it, and whether all of them are there, from their headers alone. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from onlinerl.errors import ConfigError

_TRUNK = r"(?:(?:model|gpt_neox|transformer|backbone|language_model)\.)*"
"""What the names in a language model begin with; those of its encoder or of a part for pictures begin otherwise."""
BLOCKS, BLOCK_BYTES = 256, 2**16
"""Of each large file of a model, by which it is recognised."""


def checksums(folder: Path) -> dict[str, str]:
    """What a model is, cheaply: names and sizes of its files, their first and last MiB (`checksum`), and blocks in between (`blocks`),
    because a fine-tuned model may differ from its base in its layers only."""
    ends, blocks = hashlib.sha256(), hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".bin", ".jinja", ".model"}):
        if file.name == "onlinerl_source.json":
            continue
        size = file.stat().st_size
        ends.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as data:
            ends.update(data.read(2**20))
            if size > 2**21:
                data.seek(-(2**20), 2)
                ends.update(data.read())
                for i in range(BLOCKS):
                    data.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
                    blocks.update(data.read(BLOCK_BYTES))
    return {"checksum": ends.hexdigest(), "blocks": blocks.hexdigest()}


def parameters(model: str, local: Path | None) -> float | None:
    """How many parameters a model has; of one that is not on this machine, what its name says. None if that is not known.

    Args:
        model: directory or hub id.
        local: where its files lie, if they are on this machine.

    Raises:
        ConfigError: if a file is missing or not whole.
    """
    if local is None:
        match = re.search(r"(\d+(?:\.\d+)?)([bm])\b", model.lower())  # as names have it: 7B, 0.5b, 135M
        return float(match[1]) * (1e9 if match[2] == "b" else 1e6) if match else None
    files = sorted(local.glob("*.safetensors"))
    if not files and not any(local.glob("*.bin")):
        raise ConfigError(f"{local} holds no weights", field="model", fix="put the *.safetensors files there")
    if missing := _listed(local) - {file.name for file in files}:
        raise ConfigError(
            f"{local} lacks {len(missing)} of the files that its index lists, {min(missing)} among them",
            field="model",
            fix="download it again",
        )
    return float(sum(prod(shape) for shape in shapes(local).values())) or None


def shapes(model: Path) -> dict[str, list[int]]:
    """Of the tensors in a model's safetensors files, by name.

    Raises:
        ConfigError: if a file is not whole.
    """
    files = sorted(model.glob("*.safetensors"))
    return {name: tensor["shape"] for file in files for name, tensor in _tensors(file).items()}


def layers(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """How many layers of a language model there are; None if they have names that are not known here."""
    numbers = [int(found[1]) for name in shapes if (found := re.match(rf"{_TRUNK}(?:layers|h)\.(\d+)\.", name))]
    return max(numbers) + 1 if numbers else None


def matrices(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices in the layers of a language model, by the names of their modules, and of its experts' weights, which may
    be one tensor for all of them. Empty if layers have names that are not known here."""
    found = {}
    for name, shape in shapes.items():
        if re.match(rf"{_TRUNK}(?:layers|h)\.\d+\.", name) and len(shape) >= 2:
            module = name.removesuffix(".weight")
            if (len(shape) == 2 and module != name) or ".experts." in name:
                found[module] = (shape[-2], shape[-1])
    return found


def embedding(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int] | None:
    """Rows and columns of a language model's input embedding; None if it has a name that is not known here."""
    tables = (s for name, s in shapes.items() if re.fullmatch(rf"{_TRUNK}(?:embed_tokens|embed_in|wte)\.weight", name))
    return next(((s[0], s[1]) for s in tables if len(s) == 2), None)


def _listed(model: Path) -> set[str]:
    """The files that a model in several files is made of."""
    index = model / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} cannot be read: {error}", field="model", fix="download it again") from None


def _tensors(file: Path) -> dict[str, Any]:
    """What a safetensors file says about its tensors, by name.

    Raises:
        ConfigError: if it is none, or is not whole.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if length > size:
                raise ValueError("it does not begin with a header")
            tensors: dict[str, Any] = json.loads(data.read(length))
        tensors.pop("__metadata__", None)
        wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if size != wanted:
            raise ValueError(f"it should have {wanted} bytes and has {size}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no whole safetensors file: {error}",
            field="model",
            fix="download it again; a few lines of text in its place are a pointer, which `git lfs pull` replaces by the file",
        ) from None
    return tensors
