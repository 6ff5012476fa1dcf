"""Padding-free micro-batches: sequences one after the other in a single row, where none of them sees another.

Position ids begin anew with each sequence. Flash attention is told where sequences begin and end. Of the position ids transformers makes a
mask for `sdpa` and `eager` in which attention stays within a sequence; with it alone all pairs of positions of a row would be computed, so
these are called sequence by sequence, each with its own part of the mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onlinerl.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = "packed_lengths"
"""The argument by which attention is told how long the sequences of a row are; transformers hands what it does not know on."""


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """The B sequences of a batch in one row of L tokens."""

    tokens_1L: Tensor
    positions_1L: Tensor
    """Of each token in its own sequence."""
    starts_B: Tensor
    """Where in the row each sequence begins."""
    lengths: tuple[int, ...]

    @staticmethod
    def of(batch: Batch) -> PackedRow:
        """Without what is padding in the batch."""
        mask_BS = batch.sequence_mask_BS
        lengths_B = mask_BS.sum(dim=1)
        positions_BS = torch.arange(mask_BS.shape[1], device=mask_BS.device).expand(mask_BS.shape)
        return PackedRow(
            tokens_1L=batch.tokens_BS[mask_BS][None],
            positions_1L=positions_BS[mask_BS][None],
            starts_B=lengths_B.cumsum(0) - lengths_B,
            lengths=tuple(lengths_B.tolist()),
        )

    def arguments(self, attention: str) -> dict[str, Any]:
        """Of a forward pass of a model with this implementation of attention."""
        given: dict[str, Any] = {"input_ids": self.tokens_1L, "position_ids": self.positions_1L}
        if attention in _BY_SEQUENCE.values():
            return given | {LENGTHS: self.lengths}
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.tokens_1L.device)
        longest = max(self.lengths)
        return given | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def prepare(network: PreTrainedModel) -> None:
    """Let the attention of a model go through a row sequence by sequence, from now on. Flash attention can do that by itself."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    inner: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "sdpa": (_sdpa, sdpa_mask),
        "eager": (_eager, eager_mask),
    }
    for name, (function, mask) in inner.items():
        AttentionInterface.register(_BY_SEQUENCE[name], _by_sequence(function))
        AttentionMaskInterface.register(_BY_SEQUENCE[name], mask)
    if (named := _BY_SEQUENCE.get(network.config._attn_implementation)) is not None:
        network.set_attn_implementation(named)


_BY_SEQUENCE = {"sdpa": "sdpa_by_sequence", "eager": "eager_by_sequence"}


def _sdpa(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    answer: tuple[Tensor, None] = sdpa_attention_forward(module, *args, **kwargs)
    return answer


def _eager(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Each family has a function of its own, with all that is special about its attention."""
    function: Callable[..., tuple[Tensor, Tensor | None]] = sys.modules[type(module).__module__].eager_attention_forward
    return function(module, *args, **kwargs)


def _by_sequence(inner: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An implementation of attention as transformers calls it, which computes no pair of positions of two sequences."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        lengths = kwargs.pop(LENGTHS, None)
        if lengths is None or len(lengths) == 1:
            return inner(module, query, key, value, attention_mask, **kwargs)
        parts = []
        for start, end in pairwise((0, *accumulate(lengths))):
            here = slice(start, end)
            ours = (each[:, :, here] for each in (query, key, value))
            mask = None if attention_mask is None else attention_mask[:, :, here, here]
            parts.append(inner(module, *ours, mask, **kwargs)[0])
        return torch.cat(parts, dim=1), None  # [1, L, heads, head size]

    return forward
