"""A vLLM worker that loses or alters what it is sent, when it is told to; named by `worker_extension_cls` in tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from onlinerl.transports._receiver import Receiver
from onlinerl.transports.gloo import halves

usual = halves.unpack


def lose(flat: Tensor, run: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """The bucket never came."""
    yield from ()


def flip(flat: Tensor, run: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """One bit of the bucket is another."""
    flat = flat.clone()
    flat.view(torch.uint8)[0] ^= 1
    yield from usual(flat, run)


class FaultyReceiver(Receiver):
    """`Receiver` with a fault that can be switched on in one worker, for the n-th bucket that it receives from then on."""

    def plant(self, rank: int, fault: str, bucket: int) -> None:
        """`fault` is `lose`, `flip` or `none`."""
        seen = 0

        def unpack(flat: Tensor, run: list[Any]) -> Iterator[tuple[str, Tensor]]:
            nonlocal seen
            seen += 1
            return {"lose": lose, "flip": flip}[fault](flat, run) if seen == bucket else usual(flat, run)

        halves.unpack = unpack if self.rank == rank and fault != "none" else usual  # type: ignore[attr-defined]
