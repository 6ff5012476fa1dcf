"""Models that are made of two others: tensor by tensor, in float32, with no more than one tensor of each in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onlinerl.errors import LearnerError
from onlinerl.protocols.learner import TensorMeta, WeightSource

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""By their names in safetensors files."""


class SavedSource:
    """The tensors of a model on disk, read one after the other; a `protocols.learner.WeightSource`.

    Args:
        model: directory with safetensors files.
        names: which tensors, in this order; all of them by default. A file may leave the first part of a name out, as transformers
            allows (`wte.weight` for `transformer.wte.weight`), and may hold more, such as buffers.

    Raises:
        LearnerError: if a tensor is not there.
    """

    def __init__(self, model: Path, names: Sequence[str] | None = None) -> None:
        from safetensors import safe_open

        files: list[Any] = [safe_open(file, framework="pt") for file in sorted(model.glob("*.safetensors"))]
        homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118  it is no mapping
        self._homes: dict[str, tuple[Any, str]] = {}
        for name in homes if names is None else names:
            stored = name if name in homes else name.partition(".")[2]
            if stored not in homes:
                raise LearnerError(
                    f"{model} has no tensor {name}",
                    field="weights",
                    fix="the two models must be of one family and version, with their weights in safetensors files",
                )
            self._homes[name] = homes[stored], stored

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and shape of every tensor, from the headers."""
        found = []
        for name, (file, stored) in self._homes.items():
            header = file.get_slice(stored)
            found.append(TensorMeta(name, _DTYPES[header.get_dtype()], tuple(header.get_shape())))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, (file, stored) in self._homes.items():
            yield name, file.get_tensor(stored)


class Interpolated:
    """The model `start + weight * (end - start)`, in float32: between two models, or beyond the second one where `weight` is above 1.

    Args:
        start, end: models with the same tensors, in the same order.
        weight: with 0 it is `start`, with 1 `end`, bit for bit.

    Raises:
        LearnerError: if they have other tensors.
    """

    def __init__(self, start: WeightSource, end: WeightSource, weight: float) -> None:
        self._start, self._end, self._weight = start, end, weight
        for one, other in zip(start.metadata(), end.metadata(), strict=True):
            if (one.name, one.shape) != (other.name, other.shape):
                raise LearnerError(
                    f"one model has {one.name} of shape {list(one.shape)} where the other one has {other.name} of shape {list(other.shape)}",
                    field="weights",
                    fix="the two models must be of one family and size",
                )

    def metadata(self) -> list[TensorMeta]:
        """Name and shape of every tensor."""
        return [TensorMeta(name, torch.float32, shape) for name, _, shape in self._end.metadata()]

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once. Collective where weights are cut up among ranks."""
        for (name, start), (_, end) in zip(self._start, self._end, strict=True):
            yield name, self._mixed(start.float(), end.float())

    @torch.no_grad()
    def _mixed(self, start: Tensor, end: Tensor) -> Tensor:
        if self._weight in (0, 1):  # exact for zeros with a sign and for what is not finite, too
            return end if self._weight else start
        return torch.lerp(start.to(end.device), end, self._weight)
