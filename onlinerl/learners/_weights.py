"""The policy's parameters as a `WeightSource`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from onlinerl.errors import LearnerError
from onlinerl.protocols.learner import TensorMeta


class PolicySource:
    """Yields every parameter once, whole, in the wire dtype, layer by layer; a `protocols.learner.WeightSource`.

    Tied weights appear once, under the name the model's own loader expects.

    Args:
        model: the language model, without critic.
        dtype: what goes over the wire.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        by_name = dict(model.named_parameters())  # removes tied duplicates
        self._parameters = {name: by_name[name] for name in layer_by_layer(list(by_name))}

    def metadata(self) -> list[TensorMeta]:
        """Name, wire dtype and full shape of every parameter, without gathering."""
        return [TensorMeta(name, self._dtype, self._shape(p)) for name, p in self._parameters.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.whole():
            yield name, parameter.detach().to(self._dtype)

    def whole(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters themselves, each whole until the next one is asked for."""
        yield from self._parameters.items()

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)


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
