"""The policy's parameters as a vLLM `WeightSource`, also when ZeRO-3 has cut them up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups


class PolicySource(WeightSource):
    """Yields every parameter once, whole, in the wire dtype, layer by layer.

    Under ZeRO-3 a parameter is a zero-size stub between uses: its true shape is `ds_shape`, and it is gathered, one at a time, for
    the moment it is yielded (R-B6). Tied weights appear once, under the name the model's own loader expects (R-B7).

    Args:
        model: the language model, without critic.
        dtype: what goes over the wire.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        by_name = dict(model.named_parameters())  # removes tied duplicates
        # Layer order: vLLM buffers a layer until it is complete, so parameters of one layer must come together.
        self._parameters = {name: by_name[name] for group in layerwise_groups(list(by_name)) for name in group}

    def metadata(self) -> list[ParamMeta]:
        """Name, wire dtype and full shape of every parameter, without gathering."""
        return [ParamMeta(name, self._dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._parameters.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.whole():
            # A copy, because gathered storage is given back before the bytes may have been sent (R-B4).
            yield name, parameter.detach().to(self._dtype, copy=hasattr(parameter, "ds_id"))

    def whole(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters themselves, each whole until the next one is asked for. Collective under ZeRO-3."""
        for name, parameter in self._parameters.items():
            if not hasattr(parameter, "ds_id"):
                yield name, parameter
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                yield name, parameter
