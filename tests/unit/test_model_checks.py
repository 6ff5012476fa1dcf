"""Models that `check` refuses, because engine or learner could not work with them, and those beside them that it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onlinerl import config as configuration
from onlinerl import preflight, weight_files
from onlinerl.errors import ConfigError


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that may be altered."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def check(toy_config: Callable[..., Path], tmp_path: Path, model: Path) -> Callable[[], preflight.Checked]:
    return lambda: preflight.check(configuration.settled(configuration.load(toy_config(tmp_path, model=str(model)))))


def describe(model: Path, **changes: Any) -> None:
    """Change its config.json; None takes a key away."""
    written = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not None}))


def add_token(model: Path, *, special: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["picture"], special_tokens=special)
    tokenizer.save_pretrained(model)


CODE = {"AutoConfig": "configuration_novel.NovelConfig", "AutoModelForCausalLM": "modeling_novel.NovelForCausalLM"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq", "that it was made from"),
    "no method": ({"quantization_config": {}}, r"quantized \(quantization_config in", "that it was made from"),
    "older key": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "made from"),
    "nested": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"quantized \(fp8", "made from"),
    "encoder": ({"architectures": ["BertModel"], "model_type": "bert"}, "no causal language model.* BertModel", "ForCausalLM"),
    "reward model": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification", "ForCausalLM"),
    "remote code": ({"auto_map": CODE, "model_type": "novel"}, "'novel' needs code that comes with the model", "a family that"),
    "remote model": (
        {"auto_map": {"AutoModelForCausalLM": CODE["AutoModelForCausalLM"]}, "model_type": "t5"},
        "has AutoModelForCausalLM",
        "a family that",
    ),
    "more layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and the weight files hold 2 layers", "restore"),
    "wider": ({"hidden_size": 64}, "hidden_size is 64, and the embedding in the weight files is .* x 32", "restore"),
    "more tokens": ({"vocab_size": 1000}, "vocab_size is 1000, and the embedding", "restore"),
    "no object": ({}, "holds a list, and must hold a JSON object", "delete it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused(check: Callable[[], preflight.Checked], model: Path, name: str) -> None:
    check()
    changes, cause, fix = REFUSED[name]
    describe(model, **changes)
    if name == "no object":
        (model / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=cause) as caught:
        check()
    assert caught.value.field == "model"
    assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"architectures": ["LlamaModel", "LlamaForCausalLM"]},
        {"auto_map": CODE},
        {"auto_map": {"AutoModel": "modeling_novel.NovelModel"}},
        {"quantization_config": None},
    ],
)
def test_what_can_run_is_taken(check: Callable[[], preflight.Checked], model: Path, changes: dict[str, Any]) -> None:
    describe(model, **changes)
    check()


@pytest.mark.parametrize("content", [b"no json", b"", b"\xff\xfe"])
def test_a_generation_config_that_engine_and_learner_do_without(
    check: Callable[[], preflight.Checked], model: Path, content: bytes
) -> None:
    from transformers import AutoModelForCausalLM

    (model / "generation_config.json").write_bytes(content)
    check()
    AutoModelForCausalLM.from_pretrained(model)


def test_a_tokenizer_with_more_tokens_than_the_model_has(check: Callable[[], preflight.Checked], model: Path) -> None:
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    add_token(model, special=False)
    with pytest.raises(ConfigError, match=f"tokens up to number {size}, .* ends at {size - 1}") as caught:
        check()
    assert caught.value.field == "model"
    assert "resize_token_embeddings" in str(caught.value.fix)


def test_a_special_token_that_no_prompt_has_needs_no_embedding(
    check: Callable[[], preflight.Checked], model: Path, tmp_path: Path
) -> None:
    add_token(model, special=True)
    check()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "one more", "text": "the picture was"}) + "\n")
    with pytest.raises(ConfigError, match="its tokenizer has tokens up to number"):
        check()


@pytest.mark.parametrize(
    ("name", "layers", "embedding"),
    [
        ("model.layers.4.mlp.experts.7.up_proj.weight", 5, None),
        ("transformer.h.4.attn.c_attn.weight", 5, None),
        ("model.language_model.layers.4.mlp.up_proj.weight", 5, None),
        ("model.vision_tower.encoder.layers.4.mlp.weight", None, None),
        ("model.decoder.layers.4.fc1.weight", None, None),
        ("gpt_neox.embed_in.weight", None, (6, 2)),
        ("transformer.wte.weight", None, (6, 2)),
        ("model.decoder.embed_tokens.weight", None, None),
        ("lm_head.weight", None, None),
    ],
)
def test_names_in_weight_files(name: str, layers: int | None, embedding: tuple[int, int] | None) -> None:
    assert weight_files.layers({name: [6, 2]}) == layers
    assert weight_files.embedding({name: [6, 2]}) == embedding
