"""Whether a model fits a replica, and which cores a replica takes: arithmetic, without vLLM."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from onlinerl import config as configuration
from onlinerl import hardware, preflight
from onlinerl.engines import _fit, _vllm
from onlinerl.engines.vllm import VLLM
from onlinerl.errors import ConfigError
from onlinerl.protocols.engine import Place

BLOCK = 128


def place(host: str, *cores: int) -> Place:
    return Place(host=host, cores=cores)


def shares(places: list[Place], **engine: int) -> list[list[list[int]]]:
    return [_fit.share_cores(places, i, VLLM(**engine)) for i in range(len(places))]


@pytest.mark.parametrize(
    ("engine", "compiles"), [({}, False), ({"enforce_eager": True}, False), ({"enforce_eager": False}, True)]
)
def test_nothing_is_compiled_on_cpu_unless_it_is_asked_for(monkeypatch, engine, compiles):
    """The first log-probs of a replica would wait a quarter of a minute for a compiler."""
    monkeypatch.setattr(os, "environ", {})
    kept = hardware.keeping_memory()
    _vllm.prepare_cpu(VLLM(**engine), [[0, 1], [2]])
    assert os.environ.pop("TORCHDYNAMO_DISABLE", None) == (None if compiles else "1")
    assert os.environ == {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2", **kept}


# --- cores ---


def test_a_replica_alone_takes_all_cores_of_its_machine():
    assert shares([place("a", 0, 1, 2, 3)]) == [[[0, 1, 2, 3]]]


def test_replicas_share_the_machine_that_they_are_on_and_no_other():
    """The controller may be on a machine of another size, with other cores."""
    places = [place("a", 0, 1, 2, 3), place("b", 8, 9), place("a", 0, 1, 2, 3), place("c", 5)]
    assert shares(places) == [[[0, 1]], [[8, 9]], [[2, 3]], [[5]]]


def test_replicas_on_one_machine_that_may_use_different_cores_do_not_share():
    assert shares([place("a", 0, 1), place("a", 2, 3)]) == [[[0, 1]], [[2, 3]]]


def test_threads_limit_the_share():
    assert shares([place("a", 0, 1, 2, 3)] * 2, threads=1) == [[[0]], [[1]]]
    assert shares([place("a", 0, 1)], threads=8) == [[[0, 1]]]


def test_more_replicas_than_cores_take_turns():
    assert shares([place("a", 0, 1)] * 3) == [[[0]], [[1]], [[0]]]


def test_the_workers_of_a_replica_divide_its_share():
    assert shares([place("a", 0, 1, 2, 3, 4)], tensor_parallel_size=2) == [[[0, 1], [2, 3, 4]]]
    assert shares([place("a", *range(8))] * 2, tensor_parallel_size=2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert shares([place("a", 0, 1)] * 2, tensor_parallel_size=2) == [[[0], [1]]] * 2, "replicas overlap, workers do not"


def test_more_workers_than_cores_are_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: each of the 4 workers .* on a a replica has 2"):
        shares([place("a", 0, 1)], tensor_parallel_size=4)
    with pytest.raises(ConfigError, match=r"engine\.threads"):
        shares([place("a", *range(8))], tensor_parallel_size=4, threads=2)


# --- division ---


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"num_attention_heads": 9}, "num_attention_heads"),
        ({"num_attention_heads": 8, "intermediate_size": 9}, "intermediate_size"),
        ({"num_attention_heads": 8, "moe_intermediate_size": 9}, "moe_intermediate_size"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"text_config": {"num_attention_heads": 9}}, "num_attention_heads"),
    ],
)
def test_what_two_workers_cannot_divide_is_named(model, key):
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size: .*{key}"):
        _fit.check_division(VLLM(tensor_parallel_size=2), model)
    _fit.check_division(VLLM(), model)


def test_a_single_key_value_head_is_given_to_every_worker():
    _fit.check_division(VLLM(tensor_parallel_size=4), {"num_attention_heads": 8, "num_key_value_heads": 1})


# --- KV cache ---

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}


def smallest(model: dict, max_model_len: int, **engine: object) -> float:
    """The least GiB that pass, to 1 KiB."""
    low, high = 0, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _fit.check_kv_cache(VLLM(kv_cache_gib=middle / 2**20, **engine), model, max_model_len)  # type: ignore[arg-type]
            high = middle
        except ConfigError:
            low = middle
    return high * 1024


def test_the_cache_must_hold_the_longest_sequence_and_the_block_that_vllm_keeps():
    per_token = 2 * 2 * 2 * 32 * 2  # keys and values, layers, heads, head size, bytes
    assert smallest(LLAMA, 129) == 3 * BLOCK * per_token
    assert smallest(LLAMA, 129, dtype="float32") == 6 * BLOCK * per_token
    assert smallest(LLAMA | {"head_dim": 64}, 128) == 4 * BLOCK * per_token
    assert smallest(LLAMA, 128, tensor_parallel_size=2) == BLOCK * per_token


@pytest.mark.parametrize(
    "more",
    [
        {"sliding_window": 64},
        {"kv_lora_rank": 8},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"num_hidden_layers": None},
    ],
)
def test_models_that_keep_less_are_left_to_vllm(more):
    _fit.check_kv_cache(VLLM(kv_cache_gib=1e-9), LLAMA | more, 4096)


def test_a_window_that_is_switched_off_does_not_count():
    with pytest.raises(ConfigError, match=r"kv_cache_gib"):
        _fit.check_kv_cache(VLLM(kv_cache_gib=1e-9), LLAMA | {"sliding_window": 64, "use_sliding_window": False}, 4096)


# --- `check` ---


@pytest.fixture
def check(toy_config, tmp_path):
    def check(**overrides: object) -> preflight.Checked:
        keys = {"engine.name": "vllm", "learner.name": "deepspeed", "cluster.device": "cpu"}
        keys |= {key.replace("__", "."): value for key, value in overrides.items()}
        return preflight.check(configuration.settled(configuration.load(toy_config(tmp_path, keys))))

    return check


def test_check_refuses_what_a_replica_could_not_start_with(check, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(_fit, "this_place", lambda: place("here", 0, 1))
    check()
    check(engine__tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: each of the 4 workers"):
        check(engine__tensor_parallel_size=4)
    check(engine__tensor_parallel_size=4, cluster__address="10.0.0.1:6379")  # machines that `check` does not see
    with pytest.raises(ConfigError, match=r"kv_cache_gib: is 1e-05, and one sequence of 32 tokens needs"):
        check(engine__kv_cache_gib=1e-5)
    check(engine__kv_cache_gib=1e-5, cluster__device="cuda")  # where it is not used

    model = Path(shutil.copytree(tiny_model, tmp_path / "odd"))
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"intermediate_size": 63}))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: .*intermediate_size of 63"):
        check(model=str(model), engine__tensor_parallel_size=2)
