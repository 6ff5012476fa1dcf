"""A model in Hugging Face format, written tensor by tensor: no process ever holds more of it than one tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from onlinerl.protocols.learner import TensorMeta

MAX_SHARD_BYTES = 5 * 10**9
"""A larger model is cut into several files with an index, as transformers does."""

# The names of dtypes in safetensors files.
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Exportable(Protocol):
    """Where the weights of an export come from."""

    def metadata(self) -> Sequence[TensorMeta]:
        """Names and full shapes, in the order in which the tensors come."""
        ...

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, whole until the next one is asked for."""
        ...


class _Shard:
    """One safetensors file: 8 bytes with the length of the header, the header as JSON, then the bytes of the tensors.

    The library can only write a file of which it has all tensors at once.

    Args:
        path: of the file.
        shapes: of all tensors in it.
        dtype: of all tensors in it.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shapes):  # the library's own order
            start, end = end, end + prod(shapes[name]) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._data = header, 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into its place."""
        start, end = self._header[name]["data_offsets"]
        data = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        assert len(data) == end - start, f"{name} has {len(data)} bytes instead of {end - start}"
        self._file.seek(self._data + start)
        self._file.write(data.data)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def export_weights(
    source: Exportable,
    path: Path,
    dtype: torch.dtype,
    *,
    writer: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Write all weights as safetensors. Collective: every rank takes part in gathering, and only the writer copies.

    Args:
        source: of the language model, whose weights may be cut up among the ranks.
        path: an existing directory.
        dtype: of the files.
        writer: whether this rank writes; exactly one does.
        max_shard_bytes: a larger model becomes several files with an index.
        stem: what the names of the files begin with.
    """
    shapes = {m.name: m.shape for m in source.metadata()}
    files = _plan(shapes, dtype.itemsize, max_shard_bytes, stem)
    shards = (
        {file: _Shard(path / file, {n: shapes[n] for n in names}, dtype) for file, names in files.items()} if writer else {}
    )
    home = {name: file for file, names in files.items() for name in names}
    try:
        for name, parameter in source.whole():
            if writer:
                shards[home[name]].write(name, parameter.detach().to(dtype))
    finally:
        for shard in shards.values():
            shard.close()
    if writer and len(files) > 1:
        total = sum(prod(s) for s in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plan(shapes: dict[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int, stem: str) -> dict[str, list[str]]:
    """Which tensors go into which file, in the order in which they come."""
    runs: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * itemsize
        if runs[-1] and size + nbytes > max_shard_bytes:
            runs.append([])
            size = 0
        runs[-1].append(name)
        size += nbytes
    if len(runs) == 1:
        return {f"{stem}.safetensors": runs[0]}
    return {f"{stem}-{i:05d}-of-{len(runs):05d}.safetensors": run for i, run in enumerate(runs, 1)}
