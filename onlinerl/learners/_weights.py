"""The policy's parameters as a `WeightSource`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onlinerl.errors import LearnerError
from onlinerl.protocols.learner import TensorMeta


@dataclass(frozen=True)
class Merged:
    """A weight with an adapter in it: weight + scaling * b @ a (of its transpose, where the layer keeps its weight transposed), in float32,
    rounded once to the dtype of the weight."""

    weight: nn.Parameter
    a: nn.Parameter
    """[rank, in]"""
    b: nn.Parameter
    """[out, rank]"""
    scaling: float
    transposed: bool

    @torch.no_grad()
    def value(self) -> Tensor:
        """In full; all three must be whole."""
        delta = self.b.float() @ self.a.float()
        delta = delta.t() if self.transposed else delta
        return (self.weight.float() + self.scaling * delta).to(self.weight.dtype)


Weight = nn.Parameter | Merged


class PolicySource:
    """Yields every weight once, whole, in the wire dtype, layer by layer; a `protocols.learner.WeightSource`.

    Tied weights appear once, under the name the model's own loader expects.

    Args:
        model: the language model, without critic.
        dtype: what goes over the wire.
        weights: what to yield, by name; the parameters of the model by default.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, weights: Mapping[str, Weight] | None = None) -> None:
        self._dtype = dtype
        by_name: Mapping[str, Weight] = (
            dict(model.named_parameters()) if weights is None else weights
        )  # without tied duplicates
        self._weights = {name: by_name[name] for name in layer_by_layer(list(by_name))}

    def metadata(self) -> list[TensorMeta]:
        """Name, wire dtype and full shape of every weight, without gathering."""
        return [TensorMeta(name, self._dtype, self._shape(_parts(w)[0])) for name, w in self._weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.whole():
            yield name, weight.detach().to(self._dtype)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters themselves, each whole until the next one is asked for; with an adapter in it, a tensor of its own."""
        for name, weight in self._weights.items():
            with self._gathered(_parts(weight)):
                yield name, weight.value() if isinstance(weight, Merged) else weight

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside, these are whole."""
        return nullcontext()

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)


def _parts(weight: Weight) -> list[nn.Parameter]:
    """What a weight is made of, the base model's first."""
    return [weight.weight, weight.a, weight.b] if isinstance(weight, Merged) else [weight]


class Switched:
    """The policy's weights, and for the time of a block those of another model with the same tensors; a `protocols.learner.WeightSource`.

    A transport takes one source for good.
    """

    def __init__(self, source: PolicySource) -> None:
        self._source = source

    @contextmanager
    def to(self, other: PolicySource) -> Iterator[None]:
        """Inside, everything comes from `other`.

        Raises:
            LearnerError: if it has other tensors.
        """
        mine = self._source
        if other.metadata() != mine.metadata():
            raise LearnerError(
                "the saved model has other tensors than the policy, so the engine cannot take them in its place",
                field="model",
                fix="it must be the model that the run started from",
            )
        self._source = other
        try:
            yield
        finally:
            self._source = mine

    def metadata(self) -> list[TensorMeta]:
        """The same whichever it is."""
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._source


def layer_by_layer(names: Sequence[str]) -> list[str]:
    """Parameters of one layer together, because an engine keeps a layer in memory until all of it has arrived.

    What belongs to no layer and comes before the first one (embeddings) stays before, the rest comes last.

    >>> layer_by_layer(["embed", "layers.1.a", "norm", "layers.0.a", "layers.1.b"])
    ['embed', 'layers.0.a', 'layers.1.a', 'layers.1.b', 'norm']
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    before: list[str] = []
    after: list[str] = []
    for name in names:
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)  # the outermost: experts stay in their layer
        if index is None:
            (after if stacks else before).append(name)
        else:
            stacks.setdefault(".".join(parts[:index]), {}).setdefault(int(parts[index]), []).append(name)
    return before + [name for layers in stacks.values() for _, layer in sorted(layers.items()) for name in layer] + after
