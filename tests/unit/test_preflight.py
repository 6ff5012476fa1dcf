"""Derived numbers, estimates and identities: what is printed and recorded before a run."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onlinerl import config as configuration
from onlinerl import hardware, memory_checks, preflight, releases
from onlinerl.config import RunConfig, TrainingConfig
from onlinerl.config.roles import build
from onlinerl.engines import _vllm
from onlinerl.errors import ConfigError, OracleError
from onlinerl.learners.deepspeed.memory import learner_rank
from onlinerl.protocols.engine import ReplicaSettings
from onlinerl.protocols.learner import RankSettings
from onlinerl.protocols.oracle import Oracle
from onlinerl.transports.disk import Disk
from onlinerl.types import Prompt, Verdict

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def config(*overrides: str) -> RunConfig:
    return configuration.load(QUICKSTART, overrides)


def derived(*overrides: str) -> str:
    loaded = config(*overrides)
    return preflight.derived(loaded, configuration.algorithm(loaded))


# --- numbers that follow from others ---


def test_the_quickstart():
    assert derived().startswith(
        "64 prompts x 4 samples -> at most 64 pairs -> at most 8 optimizer steps an iteration (8 pairs a step"
    )
    assert derived().endswith("4 iterations")


@pytest.mark.parametrize(
    ("overrides", "items", "steps"),
    [
        (["pairing.name=all_pairs"], "384 pairs", 48),
        (["pairing.name=ranked"], "128 pairs", 16),
        (["training.epochs=2"], "64 pairs", 16),
        (["prompts.per_iteration=9"], "9 pairs", 2),
        (["algorithm.name=grpo"], "256 ", 32),
        (["algorithm.name=ppo", "training.batch_size=256"], "256 ", 1),
    ],
)
def test_items_and_steps(overrides, items, steps):
    assert f"at most {items}" in derived(*overrides)
    assert f"-> at most {steps} optimizer step" in derived(*overrides)


# --- memory ---


def test_memory_of_a_model_with_a_billion_parameters():
    """bf16 with fp32 master weights and moments: 2 + 12 bytes a parameter, 5 for gradients, and 2 for the reference."""
    one = memory_checks.estimate(config("learner.dtype=bfloat16"), 2**30)
    assert "learner 1 rank x 21.4 GiB (ZeRO-0, bfloat16: process 0.4 + weights 2.0 + gradients 5.0 + optimizer 12.0" in one
    assert "activations come on top" in one
    assert "engine 1 replica x 1 x 2.0 GiB of weights plus KV cache" in one
    # A reference that runs beside the policy is the one that every run has.
    assert memory_checks.estimate(config("algorithm.name=tdpo2", "learner.dtype=bfloat16"), 2**30) == one
    assert "reference 2.0" in one
    low = ("learner.dtype=bfloat16", "engine.dtype=bfloat16")
    eight = memory_checks.estimate(
        config(*low, "learner.ranks=8", "learner.zero_stage=3", "engine.tensor_parallel_size=2"), 2**30
    )
    assert "learner 8 ranks x 2.9 GiB (ZeRO-3" in eight
    assert "weights 0.2 + gradients 0.2 + optimizer 1.5 + reference 0.2" in eight
    assert "engine 1 replica x 2 x 1.0 GiB" in eight


FLAGS = {
    "flags\t\t: fpu sse avx avx2 fma": False,
    "flags\t\t: fpu avx512f avx512bw avx512_vnni": False,
    "flags\t\t: fpu avx512f avx512_bf16": True,
    "Features\t: fp asimd bf16": True,
    "flags\t\t: avx512_bf16\nflags\t\t: avx2": False,
    "": False,
}


@pytest.mark.parametrize("cpuinfo", FLAGS)
def test_cpus_that_compute_with_bfloat16(cpuinfo):
    assert hardware.computes_bfloat16(f"processor\t: 0\nbugs\t\t: bf16 amx_bf16\n{cpuinfo}\n") is FLAGS[cpuinfo]


@pytest.mark.parametrize(
    ("overrides", "cpu_can", "gpu", "dtypes", "note"),
    [
        ((), True, False, ("bfloat16", "bfloat16"), None),
        ((), False, False, ("float32", "float32"), "engine and learner compute in float32"),
        ((), False, True, ("bfloat16", "bfloat16"), None),
        (("cluster.device=cpu",), False, True, ("float32", "float32"), "engine and learner compute in float32"),
        (("cluster.address=auto",), False, False, ("bfloat16", "bfloat16"), None),
        (
            ("learner.dtype=bfloat16",),
            False,
            False,
            ("float32", "bfloat16"),
            "learner.dtype: this CPU has no instructions for it",
        ),
        (("engine.dtype=float16", "learner.dtype=float32"), False, False, ("float16", "float32"), "engine.dtype: this CPU"),
        (("engine.dtype=float32", "learner.dtype=float32"), True, False, ("float32", "float32"), None),
    ],
)
def test_dtypes_are_decided_where_the_run_starts(monkeypatch, overrides, cpu_can, gpu, dtypes, note):
    """bfloat16 on GPUs and on CPUs that have instructions for it; the others would be many times slower."""
    monkeypatch.setattr(hardware, "computes_bfloat16", lambda: cpu_can)
    monkeypatch.setattr(hardware, "has_gpu", lambda: gpu)
    found = configuration.settled(config(*overrides))
    assert (found.engine.dtype, found.learner.dtype) == dtypes
    assert configuration.settled(found) == found
    notes = preflight._precision(found)
    assert [n.startswith(note) for n in notes] == [True] if note else notes == []


@pytest.mark.parametrize("section", ["engine", "learner"])
def test_a_dtype_that_nobody_has_decided_is_not_taken_for_one(toy_config, tmp_path, section):
    """Memory and disk space would be those of another dtype, and a run would be stored without saying what it computes in."""
    loaded = configuration.load(toy_config(tmp_path))
    halfway = loaded.model_copy(update={section: getattr(configuration.settled(loaded), section)})
    other = "learner" if section == "engine" else "engine"
    with pytest.raises(ConfigError, match="is auto, and nothing has decided yet what that is") as error:
        preflight.check(halfway)
    assert error.value.field == f"{other}.dtype"
    assert "settle the whole configuration" in str(error.value.fix)


def rank_settings(model: Path) -> RankSettings:
    return RankSettings(
        model=str(model),
        algorithm=build({"name": "dpo"}, "algorithm"),
        training=TrainingConfig(),
        world_size=1,
        device="cpu",
        temperature=1.0,
        seed=0,
    )


@pytest.mark.parametrize("learner", ["torch", "deepspeed"])
def test_a_learner_does_not_decide_its_dtype(tiny_model, learner):
    """Before it meets the others: each rank could decide for another one."""
    with pytest.raises(ConfigError, match="is auto, and nothing has decided") as error:
        build({"name": learner}, "learner").rank(rank_settings(tiny_model), rank=0, store=None, address="")
    assert error.value.field == "learner.dtype"


@pytest.mark.parametrize("release", ["0.18.2", "0.19.8"])
def test_a_rank_looks_at_the_release_of_its_own_machine(tiny_model, monkeypatch, release):
    """Where the run was checked another one may be installed. The rank says so before it meets the others."""
    monkeypatch.setattr(releases, "installed", lambda package: release)
    learner = build({"name": "deepspeed", "zero_stage": 2}, "learner")
    with pytest.raises(ConfigError) as error:
        learner.rank(rank_settings(tiny_model), rank=0, store=None, address="")
    # With a good release it comes as far as the next thing that is wrong here.
    assert error.value.field == ("learner.zero_stage" if release == "0.18.2" else "learner.dtype")


@pytest.mark.parametrize("engine", ["vllm", "openai"])
def test_an_engine_does_not_decide_its_dtype(tiny_model, engine):
    """vLLM knows `auto` too, and means the dtype of the model's files by it."""
    config = build({"name": engine}, "engine")
    for device in ("cpu", "cuda"):
        settings = ReplicaSettings(device=device, colocated=False, max_model_len=64, transport=Disk(), seed=0)
        with pytest.raises(ConfigError, match="is auto, and nothing has decided") as error:
            _vllm.arguments(str(tiny_model), config, settings)
        assert error.value.field == "engine.dtype"
    chosen = config.model_copy(update={"dtype": "float32"})
    assert _vllm.arguments(str(tiny_model), chosen, settings)["dtype"] == "float32"


def test_memory_of_a_critic_is_that_of_a_second_model():
    parts = [learner_rank(config("learner.zero_stage=2").learner, 2**30, critic=critic) for critic in (0, 2**30)]
    assert parts[1]["reference"] == parts[0]["reference"]
    assert all(parts[1][name] == 2 * parts[0][name] for name in ("weights", "gradients", "optimizer"))


def test_memory_shrinks_with_every_stage():
    def learner(stage: int) -> float:
        text = memory_checks.estimate(config("learner.ranks=4", f"learner.zero_stage={stage}"), 7e9)
        return float(text.split(" x ")[1].split(" GiB")[0])

    sizes = [learner(stage) for stage in (0, 1, 2, 3)]
    # With one gradient per step, stage 1 keeps no more of it than stage 2.
    assert sizes[0] > sizes[1] >= sizes[2] > sizes[3]


@pytest.mark.parametrize(
    ("left", "overrides", "warns"),
    [(8, (), False), (7, (), True), (8, ("engine.replicas=2",), True), (7, ("cluster.address=auto",), False)],
)
def test_a_machine_with_less_memory_than_that_is_said(monkeypatch, left, overrides, warns):
    """A quarter of a billion parameters in float32: 5.4 GiB for the learner, 1 GiB for the engine's weights and 1 GiB for its cache."""
    chosen = config(
        "cluster.device=cpu", "learner.dtype=float32", "engine.dtype=float32", "engine.kv_cache_gib=1.0", *overrides
    )
    monkeypatch.setattr(hardware, "memory", lambda: (16.0 * 2**30, left * 2.0**30))
    said = memory_checks.check_memory(chosen, 2**28)
    assert len(said) == 1 + warns, said
    if warns:
        assert f"of the 16.0 GiB of this machine {left}.0 are left" in said[1]


MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"


def test_memory_of_this_machine_or_of_its_container(tmp_path):
    assert hardware.memory(MEMINFO, tmp_path) == (16 * 2**30, 8 * 2**30)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{3 * 2**30}\n")
    assert hardware.memory(MEMINFO, tmp_path) == (16 * 2**30, 8 * 2**30)
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    assert hardware.memory(MEMINFO, tmp_path) == (4 * 2**30, 2**30)
    assert hardware.memory("", tmp_path) is None


def test_memory_of_an_unknown_model():
    assert "not known" in memory_checks.estimate(config(), None)


# --- what check returns ---


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ({}, False),  # two steps an iteration
        ({"training.batch_size": 8}, True),
        ({"training.batch_size": 8, "training.epochs": 2}, False),
        ({"training.batch_size": 8, "algorithm.name": "onpo"}, True),  # two passes of one step, each from where it begins
    ],
)
def test_a_target_kl_that_nothing_can_exceed_is_refused(toy_config, tmp_path, overrides, refused):
    def checked(**target: float) -> None:
        path = toy_config(tmp_path, overrides | {f"training.{key}": value for key, value in target.items()})
        preflight.check(configuration.settled(configuration.load(path)))

    checked()
    if not refused:
        checked(target_kl=0.1)
        return
    with pytest.raises(ConfigError, match="nothing would read it") as caught:
        checked(target_kl=0.1)
    assert caught.value.field == "training.target_kl"


@pytest.fixture
def check(toy_config, tmp_path):
    def check(**overrides: object) -> preflight.Checked:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        return preflight.check(configuration.settled(configuration.load(toy_config(tmp_path, keys))))

    return check


def test_check_counts_the_parameters(check, tiny_model):
    checked = check(learner__dtype="bfloat16")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert checked.parameters == sum(p.numel() for p in model.parameters())
    # fp32 moments and master weights, and the weights twice: in the checkpoint and in the export.
    assert checked.state_bytes == checked.parameters * (12 + 2 * 2)
    averaged = check(learner__dtype="bfloat16", reference__schedule="ema")
    assert averaged.state_bytes == checked.parameters * (12 + 2 * 2 + 4), "the average is in fp32"
    assert len(checked.heldout) == 10
    assert len(checked.train or ()) == 40


def test_max_model_len(check):
    """The longest prompt, the response and one more token, rounded up to blocks of 16; or what was set."""
    longest = max(len(p.token_ids) for p in [*check().train, *check().heldout])  # type: ignore[misc]
    assert longest < 8
    assert check(sampling__max_new_tokens=8).max_model_len == 16
    assert check(sampling__max_new_tokens=16 - longest - 1).max_model_len == 16
    assert check(sampling__max_new_tokens=16 - longest).max_model_len == 32
    assert check(engine__max_model_len=50).max_model_len == 50


def test_fewer_heldout_prompts(check):
    assert [p.id for p in check(evaluation__prompts=3).heldout] == ["p060", "p061", "p062"]


def test_a_hub_id_leaves_the_prompts_unrendered(check):
    checked = check(model="org/name-1.5B")
    assert checked.train is None
    assert checked.parameters == 1.5e9
    assert any("is not on this machine" in note for note in checked.notes)


# --- identity ---


def test_identity(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    before = preflight.identity(str(model))
    assert before["model"] == str(model)
    (model / "README.md").write_text("notes are no part of a model")
    assert preflight.identity(str(model)) == before
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    for position in (len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert preflight.identity(str(model))["checksum"] != before["checksum"]
    weights.write_bytes(data)
    assert preflight.identity(str(model)) == before
    (model / "tokenizer_config.json").write_text("{}")
    assert preflight.identity(str(model))["checksum"] != before["checksum"]


def test_a_model_is_recognised_by_its_layers_too(tmp_path):
    """A fine-tuned model of the same size may begin and end with the bytes of its base."""
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(4 * 2**20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    base = preflight.identity(str(tmp_path))
    assert preflight.identity(str(tmp_path)) == base
    weights[3 * 2**19 : 5 * 2**19] = b"\1" * 2**20
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert preflight.identity(str(tmp_path)) != base


def test_identity_does_not_depend_on_the_place(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert preflight.identity(str(tmp_path / "copy"))["checksum"] == preflight.identity(str(tiny_model))["checksum"]


def test_identity_of_a_hub_id():
    assert preflight.identity("org/name") == {"model": "org/name"}


# --- the trial question ---


def test_probe_wants_one_result_per_query():
    class Silent(Oracle):
        def judge(self, queries):
            return []

    with pytest.raises(OracleError, match="returned 0 results for 1 queries"):
        preflight.probe_oracle(Silent(), Prompt(id="p", text="the film", token_ids=(1,)))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda k: [1.0] * k, "returned a list"),
        (lambda k: Verdict(annotator="a", oracle_version="v", scores=(1.0,)), "wrong_length.: 1 scores for 2 responses"),
        (lambda k: Verdict(annotator="a", oracle_version="v", scores=(math.nan, 1.0)), "non_finite"),
        (lambda k: Verdict(annotator="a", oracle_version="v"), "neither scores nor preferences"),
        (lambda k: Verdict(annotator="a", oracle_version="v", preferences=((0.5, 2.0), (0.0, 0.5))), "no probability"),
        (lambda k: 1 / 0, "Strange raised ZeroDivisionError"),
    ],
)
def test_an_oracle_class_is_checked_as_a_function_is(answer, says):
    """Whatever a class of the user's own returns, nothing bad gets past."""

    class Strange(Oracle):
        def judge(self, queries):
            return [answer(len(q.responses)) for q in queries]

    with pytest.raises(OracleError, match=says):
        preflight.probe_oracle(Strange(), Prompt(id="p", text="the film", token_ids=(1,)))


def test_a_downloaded_hub_id_is_found_where_it_lies(tiny_model, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(tiny_model, snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    fits = ("prompts.max_tokens=500", "sampling.max_new_tokens=8", "metrics.prometheus=false")
    checked = preflight.check(configuration.settled(config("model=org/tiny", *fits)))
    assert checked.config.model == str(snapshot)
    assert preflight.identity("org/tiny")["checksum"] == preflight.identity(str(tiny_model))["checksum"]
    assert preflight.check(configuration.settled(config("model=org/other", "metrics.prometheus=false"))).train is None


# --- schedules ---


@pytest.mark.parametrize(
    "override", ["training.lr_scheduler_type=cosine", "training.warmup_ratio=0.1", "training.iteration_decay=0.5"]
)
def test_a_learning_rate_of_0_cannot_be_scheduled(toy_config, tmp_path, override):
    fixed = configuration.settled(configuration.load(toy_config(tmp_path), ["training.learning_rate=0"]))
    preflight.check(fixed)
    scheduled = configuration.settled(configuration.load(toy_config(tmp_path), ["training.learning_rate=0", override]))
    with pytest.raises(ConfigError, match="would do nothing") as error:
        preflight.check(scheduled)
    assert error.value.field == "training.learning_rate"


def test_runs_that_start_at_once_do_not_spoil_each_others_check(tmp_path):
    """As the jobs of an array do, on one machine or several."""
    loaded = config(f"runs={tmp_path}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: preflight.check_writable(loaded.directory), range(400)))
    assert not list(tmp_path.iterdir())


# --- a critic that begins as a reward model ---


@pytest.fixture
def reward_model(tiny_model, tmp_path):
    """Makes a folder of a reward model that reads what `tiny_model` writes; keyword arguments change its configuration."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    def make(kind: type = LlamaForSequenceClassification, extra: tuple[str, ...] = (), **changes: int) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_tokens(list(extra))
        tokenizer.save_pretrained(tmp_path / "reward")
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        kind(LlamaConfig(**{"vocab_size": len(tokenizer), "num_labels": 1, **sizes, **changes})).save_pretrained(
            tmp_path / "reward"
        )
        return tmp_path / "reward"

    make.causal = LlamaForCausalLM
    return make


def checked(toy_config, folder, critic_model, **more):
    path = toy_config(folder, {"algorithm.name": "ppo", "algorithm.critic_model": str(critic_model), **more})
    return preflight.check(configuration.settled(configuration.load(path)))


def test_a_critic_may_begin_as_a_reward_model(toy_config, reward_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needs = checked(toy_config, tmp_path, reward_model().relative_to(tmp_path)).algorithm.needs
    assert needs.critic_model == str(tmp_path / "reward"), "a resume may start elsewhere"
    assert not needs.critic_head, "values are in other units than its scores"
    scores = {"algorithm.normalize_scores": False}
    assert checked(toy_config, tmp_path, "reward", **scores).algorithm.needs.critic_head


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda make: make(num_labels=2), "no reward model"),
        (lambda make: make(kind=make.causal), "no reward model"),
        (lambda make: make(extra=("more",)), "another vocabulary"),
        (lambda make: make() / "nothing", "there is no directory"),
        (lambda make: other_family(make()), "of the family mistral"),
        (lambda make: without_weights(make()), "holds no weights"),
        (lambda make: quantized(make()), "quantized"),
    ],
)
def test_what_a_critic_cannot_begin_as(toy_config, reward_model, tmp_path, spoil, cause):
    with pytest.raises(ConfigError, match=cause) as caught:
        checked(toy_config, tmp_path, spoil(reward_model))
    assert caught.value.field == "algorithm.critic_model"
    assert caught.value.fix


def other_family(folder: Path) -> Path:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"llama"', '"mistral"').replace("LlamaFor", "MistralFor"))
    return folder


def quantized(folder: Path) -> Path:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": {"quant_method": "gptq"}}))
    return folder


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def test_a_shared_critic_has_no_network_of_its_own(toy_config, reward_model, tmp_path):
    with pytest.raises(ConfigError, match="head on the policy's own network") as caught:
        checked(toy_config, tmp_path, reward_model(), **{"algorithm.critic": "shared"})
    assert caught.value.field == "algorithm.critic_model"


def test_a_critic_that_begins_as_a_reward_model_counts_with_its_own_size(toy_config, reward_model, tmp_path):
    keys = {"algorithm.name": "ppo", "learner.name": "deepspeed", "learner.dtype": "float32", "engine.name": "vllm"}
    path = toy_config(tmp_path, keys)
    sizes = []
    for critic in (None, reward_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8)):
        overrides = [f"algorithm.critic_model={critic}"] if critic else []
        (note,) = (
            n for n in preflight.check(configuration.settled(configuration.load(path, overrides))).notes if "memory" in n
        )
        sizes.append(float(note.split("weights ")[1].split(" ")[0]))
    assert sizes == [0.0, pytest.approx(0.4, abs=0.1)]
