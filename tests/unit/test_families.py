"""Log-probs of many model families against transformers' own logits, and what `check` says about those that are not supported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from onlinerl import config as configuration
from onlinerl import preflight, weight_files
from onlinerl.errors import ConfigError
from onlinerl.families import LogitRule, check_attention, logit_rule
from onlinerl.learners._loading import ModelReader
from onlinerl.learners._policy import Policy
from onlinerl.model_checks import check_description, check_weights
from onlinerl.ops.batching import collate
from onlinerl.types import TrainItem, TrainSequence

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAPPED = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
RESCALED: dict[str, dict[str, Any]] = {
    "Gemma2": {**CAPPED, "attn_logit_softcapping": 0.5},
    "Gemma3": CAPPED,
    "VaultGemma": {**CAPPED, "attn_logit_softcapping": None},
    "NanoChat": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "GraniteMoe": {"logits_scaling": 4.0, **EXPERTS},
    "GraniteMoeShared": {"logits_scaling": 4.0, "shared_intermediate_size": 16, **EXPERTS},
    "GraniteMoeHybrid": {
        "logits_scaling": 4.0,
        "layer_types": ["attention"] * 2,
        "shared_intermediate_size": 16,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        **EXPERTS,
    },
    "HyperCLOVAX": {"logits_scaling": 0.25},
}
PLAIN: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Phi": {},  # its output matrix has a bias
    "Phi3": {},
    "GPTNeoX": {},
    "Olmo2": {},
}
NAMES = {"Gemma3": "Gemma3Text"}  # of the configuration, where it is not that of the model


def build(family: str, attention: str = "eager") -> nn.Module:
    changes = RESCALED.get(family) or PLAIN[family]
    config = getattr(transformers, f"{NAMES.get(family, family)}Config")(**{**SMALL, **changes})
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default, which would hide one that is left out
                parameter.normal_()
    return model


def sequences() -> list[TrainSequence]:
    draw = torch.Generator().manual_seed(0)
    numbers = lambda n: tuple(torch.randint(3, VOCABULARY, (n,), generator=draw).tolist())  # noqa: E731
    return [TrainSequence(prompt_ids=numbers(p), response_ids=numbers(t)) for p, t in ((3, 9), (5, 4), (1, 12))]


def ours_and_theirs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all response tokens in one row: from the policy on a padded batch, and from all logits, one by one."""
    rows = sequences()
    table = Policy(model)(collate([TrainItem(prompt_id="", sequences=(s,)) for s in rows])).logprobs_BT
    plain = []
    for s in rows:
        logits = model(input_ids=torch.tensor([[*s.prompt_ids, *s.response_ids]])).logits[0].float()
        scores = torch.log_softmax(logits, dim=-1)[len(s.prompt_ids) - 1 : -1]
        plain.append(scores.gather(1, torch.tensor(s.response_ids)[:, None])[:, 0])
    return torch.cat([row[: len(s.response_ids)] for row, s in zip(table, rows, strict=True)]), torch.cat(plain)


@pytest.mark.parametrize("family", [*RESCALED, *PLAIN])
def test_logprobs_and_gradients_are_those_of_the_family_s_own_logits(family: str) -> None:
    model = build(family)

    ours, theirs = ours_and_theirs(model)

    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    weights = torch.linspace(-1, 2, len(ours))
    matrix = model.get_output_embeddings().weight
    gradients = [torch.autograd.grad((weights * x).sum(), matrix, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", list(RESCALED))
def test_each_of_these_families_would_be_wrong_without_its_rule(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onlinerl.learners._policy.logit_rule", lambda _: LogitRule())

    ours, theirs = ours_and_theirs(build(family))

    assert (ours - theirs).abs().mean() > 0.05


@pytest.mark.parametrize("family", [*RESCALED, "Phi"])
def test_the_kl_of_a_frozen_reference_is_that_of_both_models_own_logits(family: str, tmp_path: Path) -> None:
    model, reference = build(family), build(family)
    with torch.no_grad():
        reference.get_output_embeddings().weight.mul_(1.5)
    reference.save_pretrained(tmp_path)
    batch = collate([TrainItem(prompt_id="", sequences=(s,)) for s in sequences()])
    reader = ModelReader(torch.float32, "eager", torch.device("cpu"))

    found_BT = Policy(model)(batch, reference=reader.states(str(tmp_path), batch)).reference_kl_BT

    assert found_BT is not None
    for found, s in zip(found_BT, sequences(), strict=True):
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        with torch.no_grad():
            theirs, ours = (m(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1].softmax(-1) for m in (reference, model))
        plain = (theirs * (theirs.log() - ours.log())).sum(-1)
        assert plain.max() > 1e-3
        torch.testing.assert_close(found[: len(s.response_ids)], plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*RESCALED, *PLAIN])
def test_check_takes_the_files_of_each_family(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    check_description(tmp_path, "eager")
    check_weights(tmp_path)
    shapes = weight_files.shapes(tmp_path)
    assert (weight_files.layers(shapes), weight_files.embedding(shapes)) == (2, (VOCABULARY, SMALL["hidden_size"]))


@pytest.mark.parametrize(
    "key", ["final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_logit_soft_cap"]
)
def test_a_family_that_is_not_known_to_rescale_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key) as error:
        logit_rule({"model_type": "novel", key: 0.5})
    assert error.value.field == "model"
    with pytest.raises(ConfigError, match=key):
        logit_rule({"model_type": "novel_with_pictures", "text_config": {key: 0.5}})
    for nothing in (None, 1, 1.0):
        assert logit_rule({"model_type": "novel", key: nothing}) == LogitRule()


def test_a_cap_on_attention_scores_needs_an_implementation_that_has_it() -> None:
    """In transformers sdpa leaves the cap of Gemma 2 out, so that the learner would score another model than the engine runs."""
    eager, _ = ours_and_theirs(build("Gemma2"))
    sdpa, _ = ours_and_theirs(build("Gemma2", "sdpa"))
    assert (eager - sdpa).abs().mean() > 0.01

    config = build("Gemma2").config.to_dict()
    check_attention(config, "eager")
    check_attention(config, "flash_attention_2")
    check_attention({**config, "attn_logit_softcapping": None}, "sdpa")
    with pytest.raises(ConfigError, match="attn_logit_softcapping") as error:
        check_attention(config, "sdpa")
    assert error.value.field == "learner.attn_implementation"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"logits_scaling": 4.0}, "model"),
        ({"attn_logit_softcapping": 50.0}, "learner.attn_implementation"),
        ({"model_type": "novel"}, "model"),
        ({"layer_types": ["linear_attention"] * 2}, "learner.padding_free"),
        ({"model_type": "opt"}, "learner.padding_free"),
    ],
)
def test_check_knows_before_anything_is_loaded(
    tiny_model: Path, toy_config: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    packed = {"learner.padding_free": True}
    config = configuration.settled(configuration.load(toy_config(tmp_path, packed, model=str(model))))
    preflight.check(config)

    written = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**written, **changes}))

    with pytest.raises(ConfigError) as error:
        preflight.check(config)
    assert error.value.field == field
