"""What runs on GPUs only. Without one every test here is skipped; `make gpu-check` runs them one by one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has too few GPUs for (marker `gpus(n)`)."""
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    if not mine:
        return
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in mine:
        marker = item.get_closest_marker("gpus")
        wanted = marker.args[0] if marker else 1
        if wanted > there:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} GPU{'s' if wanted > 1 else ''}, and there are {there}"))


@pytest.fixture(scope="session")
def gpu_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of some 20 million parameters with the tiny model's tokenizer, big enough for memory to be measured."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "gpu"
    shutil.copytree(tiny_model, path)
    config = AutoConfig.from_pretrained(tiny_model)
    config.update(
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,  # what every attention kernel has
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path
