"""Low-rank adapters: what they are put beside, what is trained, what is dropped, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from onlinerl import config as configuration
from onlinerl import preflight
from onlinerl.batch import Batch
from onlinerl.config.roles import build
from onlinerl.errors import ConfigError, LearnerError
from onlinerl.learners._dropout import Dropout
from onlinerl.learners._lora import Adapters, targeted
from onlinerl.learners._optimizer import parameter_groups
from onlinerl.learners._policy import Policy
from onlinerl.learners._weights import PolicySource
from onlinerl.lora_checks import adapter_parameters
from onlinerl.ops.batching import collate
from onlinerl.protocols.adapters import LoraConfig
from onlinerl.types import TrainItem, TrainSequence

LORA = LoraConfig(rank=4, alpha=6.0)


def adapted(policy: Policy, config: LoraConfig = LORA, base: str = "base", seed: int = 0) -> Adapters:
    return Adapters(policy, config, base=base, seed=seed, gather=lambda *_, **__: nullcontext())


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)).eval()


@torch.no_grad()
def disturb(policy: Policy) -> None:
    """No adapter is zero any more."""
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            parameter.normal_(std=0.05)


def batch(count: int = 3) -> Batch:
    rows = [TrainSequence(prompt_ids=(1, 2, 3 + i), response_ids=tuple(range(4, 9 + i))) for i in range(count)]
    return collate([TrainItem(prompt_id=str(i), sequences=(row,)) for i, row in enumerate(rows)])


# --- what is trained ---


def test_everything_else_is_frozen_and_in_no_group_of_the_optimizer(policy, toy_config, tmp_path):
    adapters = adapted(policy)
    training = configuration.load(toy_config(tmp_path)).training
    held = [p for group in parameter_groups(policy, training) for p in group["params"]]
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and ".default." in name for name in trained)
    assert len(trained) == 2 * 2 * 7 == len(held)
    adapters.require_frozen()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_critic_s_head_is_trained_whole(tiny_model, critic):
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), critic).eval()
    adapted(policy).require_frozen()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"value_head.weight", "value_head.bias"}
    assert any(name.startswith("critic.") for name in trained) == (critic == "separate")


@pytest.mark.parametrize("fault", ["a base weight that is trained", "an adapter that is not"])
def test_a_parameter_that_is_trained_by_mistake_is_noticed(policy, fault):
    adapters = adapted(policy)
    of_base = fault.startswith("a base")
    name = "mlp.up_proj.base_layer.weight" if of_base else "mlp.up_proj.lora_A.default.weight"
    policy.get_parameter(f"model.model.layers.1.{name}").requires_grad_(of_base)
    with pytest.raises(LearnerError, match=f"layers.1.{name} is {'trained' if of_base else 'frozen'}"):
        adapters.require_frozen()


def test_the_first_values_depend_on_the_seed_alone(tiny_model):
    """Not on what random numbers were drawn before, nor on which rank it is."""

    def first(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 3)
        read = Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
        return {name: p.detach() for name, p in adapted(read, seed=seed).exported().items()}

    one, same, other = first(0), first(0), first(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name, value in one.items():
        if "lora_B" in name:
            assert not value.any()
            continue
        assert not torch.equal(value, other[name])
        bound = value.shape[1] ** -0.5
        assert 0.8 * bound < value.abs().max() <= bound


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora, policy):
    config = LoraConfig(rank=4, alpha=6.0, use_rslora=rslora)
    assert config.scaling == (3.0 if rslora else 1.5)
    adapters = adapted(policy, config)
    disturb(policy)
    name = "model.layers.0.mlp.up_proj.weight"
    (a, b), base = (
        (adapters.exported()[f"base_model.model.{name[:-7]}.lora_{x}.weight"] for x in "AB"),
        adapters.weights("base"),
    )
    merged = dict(PolicySource(policy.model, torch.float32, adapters.weights("policy")))
    assert torch.equal(merged[name], base[name] + config.scaling * (b @ a))


def test_a_family_that_keeps_its_weights_transposed(tmp_path):
    """GPT-2's layers are [in, out]; what peft merges is the same model."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    policy = Policy(model)
    adapters = adapted(policy, LoraConfig(rank=4, alpha=6.0, target_modules=["c_attn", "mlp.c_proj"]))
    disturb(policy)
    with torch.no_grad():
        expected = policy(batch()).logprobs_BT
    before = dict(GPT2LMHeadModel(model.config).named_parameters()).keys()
    merged = dict(PolicySource(model, torch.float32, adapters.weights("policy")))
    assert {*merged} == {*before}
    plain = GPT2LMHeadModel(model.config).eval()
    plain.load_state_dict(merged, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(Policy(plain).eval()(batch()).logprobs_BT, expected, atol=1e-5, rtol=0)
        with adapters.of("base"):
            assert (policy(batch()).logprobs_BT - expected).abs().max() > 1e-3


def test_merging_rounds_once(tiny_model):
    """In bfloat16, base + scaling * B @ A is computed in float32."""
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)).eval()
    adapters = adapted(policy)
    disturb(policy)
    exported, base = adapters.exported(), adapters.weights("base")
    for name, tensor in PolicySource(policy.model, torch.float32, adapters.weights("policy")):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") not in exported:
            assert torch.equal(tensor, base[name].float())
            continue
        a, b = (exported[key.format(part)].float() for part in "AB")
        assert torch.equal(tensor, (base[name].float() + 1.5 * (b @ a)).bfloat16().float())


# --- which checkpoint goes with which model ---


@pytest.mark.parametrize("fault", ["base", "rank", "layers", None])
def test_a_checkpoint_of_another_model_or_of_other_adapters_is_refused(policy, tiny_model, tmp_path, fault):
    shutil.copytree(tiny_model, tmp_path / "base")
    stored = json.loads(json.dumps(adapted(policy, base=str(tmp_path / "base")).identity))
    if fault == "base":
        weights = {name: p + 1.0 for name, p in policy.model.named_parameters() if "lora" not in name}
        save_file({n: w.detach().clone() for n, w in weights.items()}, tmp_path / "base" / "model.safetensors")
    changes = {"rank": {"rank": 8}, "layers": {"target_modules": ["q_proj"]}}.get(str(fault), {})
    again = Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    other = adapted(again, LORA.model_copy(update=changes), base=str(tmp_path / "base"))
    if fault is None:
        other.require_same(stored)
        return
    with pytest.raises(LearnerError, match="on another base model" if fault == "base" else "of other adapters"):
        other.require_same(stored)


def test_a_checkpoint_without_any_is_refused(policy, tiny_model):
    with pytest.raises(LearnerError, match="on another base model"):
        adapted(policy, base=str(tiny_model)).require_same({})


def test_deepspeed_leaves_out_what_is_frozen_under_its_second_name_too(tmp_path):
    """The output matrix of a tied model has two, and DeepSpeed knows one of them as frozen."""
    pytest.importorskip("deepspeed")
    from onlinerl.learners.deepspeed.checkpoint import PlainCheckpointEngine

    weights = {"lora_A": torch.ones(2), "lm_head.weight": torch.ones(3)}
    for only, left in ((None, {*weights}), (frozenset({"lora_A"}), {"lora_A"})):
        files = PlainCheckpointEngine()
        files.only = only
        files.save({"module": weights, "global_steps": 3}, str(tmp_path / "state.pt"))
        read = files.load(str(tmp_path / "state.pt"))
        assert {*read["module"]} == left
        assert read["global_steps"] == 3


# --- dropout ---


def noisy(policy: Policy, rank: int = 0, seed: int = 0) -> Dropout:
    policy.eval()
    return Dropout(policy, seed, rank, torch.device("cpu"))


def dropped(dropout: Dropout, policy: Policy, calls: int = 2) -> list[Tensor]:
    """Log-probs of so many micro-batches, which are all the same batch."""
    forward = dropout.numbered(policy)
    with torch.no_grad():
        return [forward(batch()).logprobs_BT for _ in range(calls)]


def test_masks_depend_on_step_micro_batch_rank_and_seed_alone(policy):
    adapted(policy, LORA.model_copy(update={"dropout": 0.5}))
    disturb(policy)
    dropout = noisy(policy)
    off = dropped(dropout, policy)
    assert torch.equal(*off)
    before = torch.get_rng_state()
    with dropout.on():
        first = dropped(dropout, policy)
        torch.rand(5)  # whatever else draws
        again = dropped(dropout, policy)
    assert all(map(torch.equal, first, again)), "a loss that goes through its micro-batches twice sees the same network"
    torch.set_rng_state(before)
    assert not torch.equal(*first)
    assert not torch.equal(first[0], off[0])
    with dropout.on():
        second = dropped(dropout, policy)
    resumed, others = noisy(policy), [noisy(policy, rank=1), noisy(policy, seed=1)]
    resumed.steps = 1
    with resumed.on():
        assert all(map(torch.equal, dropped(resumed, policy), second))
    for other in others:
        with other.on():
            assert not torch.equal(dropped(other, policy)[0], first[0])
    assert not torch.equal(second[0], first[0])
    assert torch.equal(dropped(dropout, policy)[0], off[0])
    assert not any(layer.training for layer in policy.modules() if isinstance(layer, nn.Dropout))


def test_drawing_masks_leaves_the_generator_as_it_was(policy):
    adapted(policy, LORA.model_copy(update={"dropout": 0.5}))
    dropout, before = noisy(policy), torch.get_rng_state()
    with dropout.on():
        dropped(dropout, policy)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_computed_again_drops_the_same(tiny_model):
    """With gradient_checkpointing, layers run a second time in the backward pass."""
    found = []
    for recompute in (False, True):
        policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)).eval()
        adapted(policy, LORA.model_copy(update={"dropout": 0.5}))
        disturb(policy)
        dropout = noisy(policy)
        if recompute:
            policy.recompute_activations()
        with dropout.on():
            dropout.numbered(policy)(batch()).logprobs_BT.sum().backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


# --- what is refused ---


REAL = {"engine.name": "vllm", "learner.name": "torch", "learner.dtype": "float32", "learner.lora.rank": 4}


def checked(toy_config, folder: Path, **keys: object) -> preflight.Checked:
    flat = REAL | {name.replace("__", "."): value for name, value in keys.items()}
    return preflight.check(configuration.settled(configuration.load(toy_config(folder, flat))))


@pytest.mark.parametrize(
    ("keys", "field", "cause"),
    [
        ({"learner__name": "toy", "engine__name": "toy"}, "learner.lora", "trains all weights"),
        ({"learner__lora__rank": 0}, "learner.lora.rank", "greater than or equal to 1"),
        ({"learner__lora__rank": 64}, "learner.lora.rank", "has the rank 16 at most"),
        ({"learner__lora__alpha": 0.0}, "learner.lora.alpha", "greater than 0"),
        ({"learner__lora__dropout": 1.0}, "learner.lora.dropout", "less than 1"),
        ({"learner__lora__dropout": -0.1}, "learner.lora.dropout", "greater than or equal to 0"),
        ({"learner__lora__target_modules": ["q_proj", "wq"]}, "learner.lora.target_modules", "wq is no linear layer"),
        ({"learner__lora__target_modules": ["lm_head"]}, "learner.lora.target_modules", "lm_head is no linear layer"),
        ({"learner__lora__target_modules": ["embed_tokens"]}, "learner.lora.target_modules", "embed_tokens is no linear layer"),
        ({"learner__lora__target_modules": "q_proj"}, "learner.lora.target_modules", "one text is no list"),
        ({"learner__lora__target_modules": []}, "learner.lora.target_modules", "the list is empty"),
        ({"learner__lora__target_modules": ["q_proj", "q_proj"]}, "learner.lora.target_modules", "a name twice"),
        ({"reference__schedule": "ema"}, "reference.schedule", "no adapter of the same rank"),
        ({"training__online_merging__base_model": "x"}, "training.online_merging", "would have to be an adapter"),
        ({"learner__lora__lora_alpha": 8}, "learner.lora.lora_alpha", "is not a known key"),
    ],
)
def test_what_does_not_work_is_refused(toy_config, tmp_path, keys, field, cause):
    checked(toy_config, tmp_path)
    with pytest.raises(ConfigError, match=cause) as error:
        checked(toy_config, tmp_path, **keys)
    assert error.value.field == field
    assert error.value.fix


def with_experts(model: Path) -> Path:
    """Two tensors of experts more, as files have them."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    more = {f"model.layers.0.mlp.experts.{i}.gate_proj.weight": torch.zeros(8, 32) for i in range(2)}
    save_file(tensors | more, model / "model.safetensors")
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"]])
def test_experts_are_refused(tiny_model, tmp_path, targets):
    model = with_experts(Path(shutil.copytree(tiny_model, tmp_path / "moe")))
    with pytest.raises(ConfigError, match="takes in the experts") as error:
        adapter_parameters(LoraConfig(rank=4, target_modules=targets), model)
    assert error.value.fix == "name other layers, e.g. [k_proj, o_proj, q_proj, v_proj]"
    assert adapter_parameters(LoraConfig(rank=4, target_modules=["k_proj", "o_proj", "q_proj", "v_proj"]), model)


def test_a_quantized_base_is_refused_with_what_is_missing(toy_config, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "quantized"))
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ConfigError, match=r"adapters beside them \(QLoRA\) are not there yet"):
        checked(toy_config, tmp_path, model=str(model))


def test_the_learner_says_the_same_of_a_layer_that_is_not_there(policy):
    with pytest.raises(ConfigError, match="wq is no linear layer") as error:
        targeted(policy.model, LoraConfig(target_modules=["q_proj", "wq"]))
    assert "q_proj" in error.value.fix


def test_ratios_under_dropout_are_noted(toy_config, tmp_path):
    said = [note for note in checked(toy_config, tmp_path, learner__lora__dropout=0.1).notes if "dropout" in note]
    assert said == []
    for more in ({"algorithm__name": "ppo"}, {"training__target_kl": 0.1}):
        notes = checked(toy_config, tmp_path, learner__lora__dropout=0.1, **more).notes
        assert any(note.startswith("learner.lora.dropout=0.1: ratios and KL") for note in notes)


# --- what it takes ---


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.down_proj"]])
def test_parameters_are_counted_from_the_files(policy, tiny_model, targets):
    config = LoraConfig(rank=4, target_modules=targets)
    counted = adapter_parameters(config, tiny_model)
    assert counted == sum(p.numel() for p in adapted(policy, config).exported().values())


def test_memory_and_disk(toy_config, tmp_path):
    """A seventh of a percent trained: no gradient, moment or checkpoint of the rest, and no second model as reference."""
    whole, small = checked(toy_config, tmp_path, learner__lora__rank=None), checked(toy_config, tmp_path)
    assert whole.adapters is None
    assert small.adapters == adapter_parameters(LoraConfig(rank=4), Path(small.config.model))
    assert small.state_bytes == small.parameters * 4 + small.adapters * (12 + 4 + 4)
    assert f"{small.adapters / 1e6:.2f} M of adapters trained" in " ".join(small.notes)
    critic = checked(toy_config, tmp_path, algorithm__name="ppo", algorithm__critic="separate")
    assert critic.adapters == 2 * small.adapters

    for name, key in (("torch", {}), ("deepspeed", {}), ("deepspeed", {"zero_stage": 3, "ranks": 4})):
        learner = build({"name": name, "dtype": "bfloat16", **key}, "learner")
        assert learner.adapts
        full, adapters = learner.memory(7e9), learner.memory(7e9, adapters=1e7)
        assert adapters["reference"] == 0
        assert adapters["weights"] == pytest.approx(full["weights"] * (1 + 2e7 / 7e9))
        assert adapters["optimizer"] == pytest.approx(full["optimizer"] / 700)
        assert adapters["gradients"] == pytest.approx(full["gradients"] / 700)


# --- the keys ---


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"learner.lora.rank": 4}, {"learner.lora.rank": 8}, {"learner.lora.rank": "was 4 when the run started and is now 8"}),
        (
            {"learner.lora.rank": None},
            {"learner.lora.rank": 8},
            {"learner.lora.rank": "was None when the run started and is now 8"},
        ),
        (
            {"learner.lora.rank": 4},
            {"learner.lora.rank": None},
            {"learner.lora.rank": "was 4 when the run started, and learner.lora is now left out"},
        ),
    ],
)
def test_a_resume_cannot_change_them(toy_config, tmp_path, before, now, said):
    was, wanted = (configuration.load(toy_config(tmp_path, REAL | keys)) for keys in (before, now))
    found = configuration.changes(configuration.fingerprint(was), wanted)
    assert said.items() <= found.items()
    assert not any("no such key" in each for each in found.values())
    assert configuration.changes(configuration.fingerprint(was), was) == {}


def test_a_run_of_a_version_that_had_none_goes_on(toy_config, tmp_path):
    now = configuration.load(toy_config(tmp_path, REAL | {"learner.lora.rank": None}))
    stored = {key: value for key, value in configuration.fingerprint(now).items() if not key.startswith("learner.lora")}
    assert configuration.changes(stored, now) == {}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learner.lora.r", "'rank'"),
        ("learner.lora.lora_alpha", "'alpha'"),
        ("learner.lora.lora_dropout", "'dropout'"),
        ("learner.lora_rank", "learner.lora.rank"),
        ("training.lora_target_modules", "learner.lora.target_modules"),
        ("lora_r", "learner.lora.rank"),
        ("use_peft", "learner.lora"),
        ("lora", "learner.lora"),
    ],
)
def test_other_trainers_names(toy_config, tmp_path, written, meant):
    with pytest.raises(ConfigError) as error:
        configuration.load(toy_config(tmp_path, REAL), [f"{written}=8"])
    assert f"did you mean {meant}?" in error.value.fix
