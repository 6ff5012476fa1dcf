"""Model families: small random models of each, learner against engine, before and after a push that is proved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine import CANARY, Replica, Sender, canary, changed, plain, prove, state_of
from transformers import PreTrainedModel

from onlinerl.learners._policy import Policy
from onlinerl.ops.batching import collate
from onlinerl.types import TrainItem, TrainSequence

# fp32 on both sides; other kernels, other summation order.
CLOSE = 2e-3

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A head size of 32 is the smallest that vLLM's attention on CPU has; in the second it follows from the hidden size.
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "head_dim": 32}
WIDE: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "hidden_size": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", WIDE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED),
    "qwen3-moe": ("Qwen3Moe", GROUPED | EXPERTS),
    "llama-untied": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "mistral": ("Mistral", GROUPED),
    "phi3": ("Phi3", WIDE),
    "gemma2": ("Gemma2", GROUPED | {"query_pre_attn_scalar": 32, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GROUPED | {"query_pre_attn_scalar": 32}),
    "gpt-neox": ("GPTNeoX", SMALL | {"hidden_size": 128}),
    "olmo2": ("Olmo2", WIDE),
    "granite": ("Granite", WIDE | {"logits_scaling": 4.0}),
}
QUICK = {"qwen3-moe"}
"""Those that `make test` runs; `make test-families` runs all."""


def causal(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")


@pytest.fixture
def build(tmp_path: Path, tiny_llama: Path) -> Callable[[str], Path]:
    """Writes a random model of a family, with the tokenizer of the tiny Llama."""

    def build(family: str) -> Path:
        name, options = FAMILIES[family]
        torch.manual_seed(0)
        model = causal(name)(getattr(transformers, f"{name}Config")(**options)).to(torch.float32)
        model.save_pretrained(tmp_path)
        for file in tiny_llama.glob("tokenizer*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return build


def learner(model: PreTrainedModel) -> list[np.ndarray]:
    """The learner's log-probs of the canary."""
    sequences = [TrainSequence(prompt_ids=prompt, response_ids=response) for prompt, response in CANARY]
    batch = collate([TrainItem(prompt_id=str(i), sequences=(sequence,)) for i, sequence in enumerate(sequences)])
    with torch.no_grad():
        rows = Policy(model)(batch).logprobs_BT
    return [row[: len(response)].numpy() for row, (_, response) in zip(rows, CANARY, strict=True)]


@pytest.mark.engine
@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in QUICK else (pytest.mark.families,)) for each in FAMILIES]
)
def test_a_family_is_computed_alike_and_takes_new_weights(build: Callable[[str], Path], family: str) -> None:
    path = build(family)
    model = causal(FAMILIES[family][0]).from_pretrained(path, dtype=torch.float32).eval()
    replica = Replica(path, kv_cache_gib=0.02)
    try:
        sender = Sender(replica)
        for version in (1, 2):  # as loaded, and changed
            before = canary(replica)
            sender.push(state_of(model), version)
            prove(replica, model, version)
            for ours, theirs, (prompt, response) in zip(learner(model), canary(replica), CANARY, strict=True):
                np.testing.assert_allclose(ours, plain(model, prompt, response), atol=1e-4)
                np.testing.assert_allclose(theirs, ours, atol=CLOSE)
            moved = max(float(np.abs(a - b).max()) for a, b in zip(canary(replica), before, strict=True))
            assert (moved > 10 * CLOSE) == (version == 2), "the first push changes nothing, the second does"
            changed(model)
    finally:
        replica.close()
