"""The policy's parameters for a transport, also when ZeRO-3 has cut them up."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from onlinerl.learners._weights import PolicySource


class ShardedSource(PolicySource):
    """Under ZeRO-3 a parameter is a zero-size stub between uses: its true shape is `ds_shape`, and it is gathered, one at a time, for
    the moment it is yielded. All ranks iterate in lockstep."""

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.whole():
            # A copy, because gathered storage is given back before the bytes may have been sent.
            yield name, parameter.detach().to(self._dtype, copy=hasattr(parameter, "ds_id"))

    def whole(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters themselves, each whole until the next one is asked for. Collective under ZeRO-3."""
        import deepspeed

        for name, parameter in super().whole():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=hasattr(parameter, "ds_id")):
                yield name, parameter
