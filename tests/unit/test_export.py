"""Exports that are written tensor by tensor, against what safetensors and transformers write and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from onlinerl.learners._export import export_weights
from onlinerl.learners._weights import PolicySource


def model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_is_what_the_library_writes(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    network = model(tied)
    theirs = {n: p.detach().to(dtype) for n, p in network.named_parameters()}
    save_file(theirs, tmp_path / "theirs", metadata={"format": "pt"})

    export_weights(PolicySource(network, dtype), tmp_path, dtype, writer=True)

    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_large_model_becomes_several_files_that_transformers_reads(tmp_path: Path) -> None:
    network = model(tied=False)
    network.config.save_pretrained(tmp_path)

    export_weights(PolicySource(network, torch.float32), tmp_path, torch.float32, writer=True, max_shard_bytes=8_000)

    files = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert all(f.stat().st_size < 10_000 for f in files)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = dict(network.named_parameters())
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, ours[name])


def test_ranks_that_do_not_write_leave_nothing_behind(tmp_path: Path) -> None:
    export_weights(PolicySource(model(tied=True), torch.float32), tmp_path, torch.float32, writer=False)

    assert list(tmp_path.iterdir()) == []
