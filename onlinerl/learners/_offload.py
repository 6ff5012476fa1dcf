"""Moves what a learner keeps on its device into host memory and back, whatever DeepSpeed has made of it.

DeepSpeed's own `offload_states` knows ZeRO 1 and 2, ZeRO 3 only with its own fused Adam, and stage 0 not at all. Here the memory
behind the tensors is emptied and filled again, and no tensor is replaced: parameters, partitions and moments are views of flat
buffers, and every view is afterwards what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensors_of(*roots: object) -> Iterator[Tensor]:
    """Every tensor that can be reached from these modules, optimizers, containers and DeepSpeed objects."""
    seen: set[int] = set()
    waiting: list[Any] = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
            if one.is_leaf and one.grad is not None:
                waiting.append(one.grad)
            waiting.extend(vars(one).values())  # ZeRO hangs partitions and mappings on parameters
        elif isinstance(one, Mapping):
            waiting.extend(one.keys())
            waiting.extend(one.values())
        elif isinstance(one, list | tuple | set):
            waiting.extend(one)
        elif isinstance(one, nn.Module | torch.optim.Optimizer) or type(one).__module__.startswith("deepspeed."):
            waiting.extend(getattr(one, "__dict__", {}).values())


class HostMemory:
    """Where the contents of device memory wait while somebody else uses the device.

    Args:
        device: whose memory is emptied; tensors elsewhere are left alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._away: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def take(self, tensors: Iterable[Tensor], leave: Iterable[Tensor] = ()) -> int:
        """Empty the memory behind `tensors`, but not what is shared with `leave`. Returns how many bytes were moved."""
        stay = {each.untyped_storage()._cdata for each in leave}
        moved = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            # A file mapped into memory, or memory that NumPy shares, cannot be emptied; nothing on a GPU is either.
            if (
                tensor.device != self._device
                or key in stay
                or key in self._away
                or not storage.nbytes()
                or not storage.resizable()
            ):
                continue
            self._away[key] = (storage, _bytes(storage).to("cpu", copy=True))
            moved += storage.nbytes()
            storage.resize_(0)
        return moved

    def give_back(self) -> None:
        """Fill everything again."""
        for storage, content in self._away.values():
            storage.resize_(content.numel())
            _bytes(storage).copy_(content)
        self._away.clear()

    def contents(self) -> list[Tensor]:
        """What is kept here now."""
        return [content for _, content in self._away.values()]


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
