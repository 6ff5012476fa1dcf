"""Flash attention's interface, computed in plain torch on the CPU: what a kernel is told is what counts here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention


def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let transformers' flash attention call the functions below. Returns where the sequences began and ended, of each call."""
    calls: list[list[int]] = []

    def one(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: tuple[int, int], softcap: float) -> Tensor:
        """A causal sequence, [L, heads, size]."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
        seen = (back >= 0) & ((back <= window[0]) | (window[0] < 0))
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        assert causal
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        calls.append(cu_seqlens_q.tolist())
        pieces = [slice(a, b) for a, b in pairwise(cu_seqlens_q.tolist())]
        return torch.cat([one(q[p], k[p], v[p], softmax_scale, window_size, softcap) for p in pieces])

    def whole(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        scale, window, softcap = (
            more.get(n, d) for n, d in (("softmax_scale", None), ("window_size", (-1, -1)), ("softcap", 0.0))
        )
        calls.append([0, q.shape[1]])
        return torch.stack([one(*row, scale, window, softcap) for row in zip(q, k, v, strict=True)])

    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(
        flash_attention, "get_target_dtype", lambda *_: None
    )  # no kernel takes fp32, and this looks what else to take
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (whole, varlen, None, None, None))
    return calls
