"""Dropout of adapters: off unless a training step says otherwise, and then the same whenever that step is taken again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch
from torch import nn

from onlinerl.batch import Batch, Outputs
from onlinerl.types import derive_seed

Forward = Callable[[Batch], Outputs]


class Dropout:
    """Masks that depend on the seed, the rank, the step and the micro-batch alone.

    So a resume drops what the run would have dropped, and a loss that goes through its micro-batches twice in a step sees the same network.

    Args:
        network: of which only the dropout of adapters is ever switched on.
        seed: of the run.
        rank: of this process, which has data of its own.
        device: on which masks are drawn.
    """

    def __init__(self, network: nn.Module, seed: int, rank: int, device: torch.device) -> None:
        self._layers = [
            layer for name, layer in network.named_modules() if isinstance(layer, nn.Dropout) and ".lora_dropout." in name
        ]
        self._seed, self._rank = seed, rank
        self._devices = [device] if device.type == "cuda" else []
        self.steps = 0
        """Taken so far, if anything is dropped; a checkpoint keeps it."""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside is one step, backward passes included, which may compute a layer once more."""
        if not self._layers:
            yield
            return
        for layer in self._layers:
            layer.train()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.eval()
            self.steps += 1

    def numbered(self, forward: Forward) -> Forward:
        """The same forward pass, whose n-th call drops what the n-th call of any other in this step does."""
        if not self._layers:
            return forward
        calls = count()

        def masked(batch: Batch) -> Outputs:
            with torch.random.fork_rng(devices=self._devices):
                torch.manual_seed(derive_seed(self._seed, "dropout", self._rank, self.steps, next(calls)))
                return forward(batch)

        return masked
