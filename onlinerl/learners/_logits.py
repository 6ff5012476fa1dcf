"""Logits in fp32 from a bfloat16 model: the sums of products are never rounded to 8 bits, which would cost 0.02 nats a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# On CPU so many rows of the output matrix exist in fp32 at a time: 8192 x 4096 x 4 bytes is 0.13 GB, whatever the vocabulary.
ROWS = 8192


def logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias`, fp32[N, V], accumulated in fp32 and not rounded afterwards; fp64 of fp64."""
    if weight_VH.dtype in (torch.float32, torch.float64):
        return nn.functional.linear(hidden_NH, weight_VH, bias_V)
    out: Tensor = _Fp32Logits.apply(hidden_NH, weight_VH)  # type: ignore[no-untyped-call]
    return out if bias_V is None else out + bias_V.float()


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


class _Fp32Logits(torch.autograd.Function):
    """Keeps nothing in fp32 for the backward pass. Gradients are those of a linear layer in the model's own dtype."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        if hidden_NH.device.type == "cuda":
            return torch.mm(hidden_NH, weight_VH.t(), out_dtype=torch.float32)
        out = hidden_NH.new_empty(len(hidden_NH), len(weight_VH), dtype=torch.float32)
        hidden = hidden_NH.float()
        with _bfloat16_operands():
            for start in range(0, len(weight_VH), ROWS):
                torch.mm(hidden, weight_VH[start : start + ROWS].float().t(), out=out[:, start : start + ROWS])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_NH, weight_VH = ctx.saved_tensors
        gradient = gradients[0].to(weight_VH.dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad
        return (gradient @ weight_VH if needs_hidden else None), (gradient.t() @ hidden_NH if needs_weight else None)
