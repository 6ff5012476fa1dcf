"""Logits in fp32 from a bfloat16 model: the sums of products are never rounded to 8 bits, which would cost 0.02 nats a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# On CPU so many rows of the output matrix exist in fp32 at a time: 8192 x 4096 x 4 bytes is 0.13 GB, whatever the vocabulary.
ROWS = 8192


@torch.no_grad()
def logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias`, fp32[N, V], accumulated in fp32 and not rounded afterwards; fp64 of fp64. Without gradient."""
    if weight_VH.dtype in (torch.float32, torch.float64):
        return nn.functional.linear(hidden_NH, weight_VH, bias_V)
    out = _products(hidden_NH, weight_VH)
    return out if bias_V is None else out.add_(bias_V)


@contextmanager
def _bfloat16_operands() -> Iterator[None]:
    """Let matrix products on CPU read 8 bits of fp32 operands: faster, and nothing is lost where they hold no more. Sums stay fp32."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _products(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    if hidden_NH.device.type == "cuda":
        return torch.mm(hidden_NH, weight_VH.t(), out_dtype=torch.float32)
    out = hidden_NH.new_empty(len(hidden_NH), len(weight_VH), dtype=torch.float32)
    hidden = hidden_NH.float()
    with _bfloat16_operands():
        for start in range(0, len(weight_VH), ROWS):
            torch.mm(hidden, weight_VH[start : start + ROWS].float().t(), out=out[:, start : start + ROWS])
    return out
