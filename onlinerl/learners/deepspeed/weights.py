"""The policy's parameters for a transport, also when ZeRO-3 has cut them up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from onlinerl.learners._weights import PolicySource


class ShardedSource(PolicySource):
    """Under ZeRO-3 a parameter is a zero-size stub between uses: its true shape is `ds_shape`, and it is gathered, one at a time, for
    the moment it is yielded. All ranks iterate in lockstep."""

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.whole():
            # A copy, because gathered storage is given back before the bytes may have been sent.
            yield name, weight.detach().to(self._dtype, copy=hasattr(weight, "ds_id"))

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        return gathered(parameters)


def gathered(parameters: list[nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
    """Inside, these are whole, and with `write` what rank 0 makes of them stays. Collective under ZeRO-3."""
    import deepspeed

    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        cut, modifier_rank=0 if write else None, enabled=bool(cut)
    )
    return whole
