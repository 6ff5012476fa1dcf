"""A model of 97 tokens, responses to score with it, and what a test asks of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from onlinerl.batch import Batch
from onlinerl.ops.batching import collate
from onlinerl.types import TrainItem, TrainSequence

VOCABULARY = 97


def llama(tied: bool = True, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,  # peaked distributions: a flat one hides mistakes
        tie_word_embeddings=tied,
        **more,
    )
    return LlamaForCausalLM(config).float().eval()


def sequences(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[TrainSequence]:
    """Random tokens; (prompt, response) lengths."""
    rng = np.random.default_rng(seed)
    return [
        TrainSequence(
            prompt_ids=tuple(map(int, rng.integers(1, VOCABULARY, p))),
            response_ids=tuple(map(int, rng.integers(0, VOCABULARY, t))),  # 0, the padding, is an ordinary token too
        )
        for p, t in lengths
    ]


def batch_of(rows: Sequence[TrainSequence]) -> Batch:
    return collate([TrainItem(prompt_id=str(i), sequences=(row,)) for i, row in enumerate(rows)])


ROWS = sequences([(3, 9), (5, 4), (1, 1), (7, 6)])


def logits_of(model: LlamaForCausalLM, row: TrainSequence) -> Tensor:
    """[T, V] of the states before each response token, all at once."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logits: Tensor = model(input_ids=ids).logits[0].float()
    return logits[len(row.prompt_ids) - 1 : -1]


def rows_of(table_BT: Tensor, rows: Sequence[TrainSequence]) -> list[Tensor]:
    return [table_BT[b, : len(row.response_ids)] for b, row in enumerate(rows)]


def gradients(model: LlamaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor with a vocabulary axis that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, leaf.numel() // VOCABULARY)
        return result
