"""What both ways to run vLLM have in common: inside a replica's process, and as a server of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from onlinerl import hardware
from onlinerl.engines import _fit
from onlinerl.errors import ConfigError
from onlinerl.protocols.engine import EngineConfig, ReplicaSettings
from onlinerl.protocols.keys import Resumable, decided

TOKENS_PER_STEP = 2048
"""Least token budget of a step on CPU; vLLM's own default."""


class VllmConfig(EngineConfig):
    """The keys of an engine that starts vLLM."""

    kv_cache_gib: Resumable[float] = Field(1.0, gt=0)
    """Memory for the KV cache of each worker of a replica on CPU, in GiB."""
    gpu_memory_utilization: Resumable[float] = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that a replica may take."""
    enforce_eager: Resumable[bool | None] = None
    """Skip graph capture; by default on for CPU, off for GPU."""

    @property
    def cache_bytes(self) -> float:
        """As configured."""
        return self.kv_cache_gib * _fit.GIB

    def check(self, model: Mapping[str, Any], max_model_len: int, *, on_cpu: bool, alone: bool) -> None:
        """What vLLM would say only after it has started, or in no words that name a key of ours."""
        _fit.check_division(self, model)
        if on_cpu:
            _fit.check_kv_cache(self, model, max_model_len)
            if alone:  # otherwise the replicas' machines are known only once they are there
                _fit.share_cores([_fit.this_place()], 0, self)

    def environment(self) -> dict[str, str]:
        """Environment variables that a replica's process must start with."""
        return {
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "ONLINERL_DIE_WITH_PARENT": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
"""For a small function behind its log-probs vLLM calls the compiler on CPU even where graphs are not captured, and the first answer waits a
quarter of a minute for it."""


def prepare_cpu(config: VllmConfig, cores: Sequence[Sequence[int]]) -> None:
    """Set what the workers of a replica on CPU find in their environment, whom this process will start: the cores of each, that memory is kept,
    and that nothing is compiled, unless the configuration asks for it."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, worker)) for worker in cores)
    os.environ.update(hardware.keeping_memory())
    if config.enforce_eager is not False:
        os.environ.update(NO_COMPILER)


def arguments(model: str, config: VllmConfig, settings: ReplicaSettings) -> dict[str, Any]:
    """vLLM's own arguments for a replica, by the names that they have in `EngineArgs`; what is left out is vLLM's default.

    Args:
        model: directory or hub id.
        config: the engine section.
        settings: what else a replica is told.

    Raises:
        ConfigError: if it is not decided which dtype it computes in, or if the KV cache could not hold one sequence.
    """
    dtype = decided(config.dtype, "engine.dtype")  # vLLM would take `auto` for the dtype of the model's files
    on_cpu, receiver = settings.device == "cpu", settings.transport.receiver
    if on_cpu:
        _fit.check_kv_cache(config, _description(model), settings.max_model_len)
    common = {
        "model": model,
        "dtype": dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": config.enforce_eager if config.enforce_eager is not None else on_cpu,
        "seed": settings.seed,
        # The log-probs of the distribution that was really sampled from: temperature and truncation applied.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "onlinerl.transports._receiver.Receiver",
        "disable_log_stats": True,
    }
    if config.tensor_parallel_size > 1:
        # Left to itself, vLLM takes its Ray executor inside a placement group, which places workers outside of it.
        common["distributed_executor_backend"] = "mp"
    if receiver is not None:
        common["weight_transfer_config"] = {"backend": receiver}
    return {**common, **(_on_cpu(config, settings.max_model_len) if on_cpu else _on_gpu(config, settings.colocated))}


def _description(model: str) -> dict[str, Any]:
    """The contents of the model's config.json.

    Raises:
        ConfigError: if it is not there.
    """
    try:
        description: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
        return description
    except OSError as error:
        raise ConfigError(
            f"{model} is not on the machine of this replica: {error}",
            field="model",
            fix="put it on a disk that all nodes share",
        ) from error


def _on_cpu(config: VllmConfig, max_model_len: int) -> dict[str, Any]:
    """vLLM's arguments that only a CPU replica takes."""
    return {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * _fit.GIB),
        # A prompt is never split over steps: after each part vLLM takes back the random number that the request's own generator
        # gave, and a generator on CPU cannot go back. The budget lets the longest prompt in beside a full batch.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(TOKENS_PER_STEP, max_model_len + config.max_num_seqs),
    }


def _on_gpu(config: VllmConfig, colocated: bool) -> dict[str, Any]:
    """vLLM's arguments that only a GPU replica takes."""
    return {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": colocated}
