"""Whether a model fits the layout of a vLLM replica, from its config.json alone: what vLLM would say only after it has started."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, Any

from onlinerl.errors import ConfigError
from onlinerl.protocols.engine import EngineConfig, Place

if TYPE_CHECKING:
    from onlinerl.engines._vllm import VllmConfig

GIB = 2**30
CPU_BLOCK = 128
"""Tokens in a block of the KV cache of vLLM on CPU."""


def this_place() -> Place:
    """Where this process runs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Place(host=socket.gethostname(), cores=tuple(cores))


def share_cores(places: Sequence[Place], index: int, config: EngineConfig) -> list[list[int]]:
    """The cores of each worker of CPU replica `index`: a fair share of what its own machine has.

    Args:
        places: of all replicas. Those with the same host and cores share them.
        index: which of them is asked about.
        config: `threads` limits or widens the share; `tensor_parallel_size` workers divide it.

    Raises:
        ConfigError: if there is no core for each worker.
    """
    here = places[index]
    cores, workers = here.cores, config.tensor_parallel_size
    neighbours = [i for i, place in enumerate(places) if place == here]
    fair = max(1, len(cores) // len(neighbours))
    # Replicas may share cores where there are too few; the workers of one replica wait for each other, so they may not.
    width = min(config.threads or max(fair, workers), len(cores))
    if width < workers:
        raise ConfigError(
            f"each of the {workers} workers of a replica needs a core of its own; on {here.host} a replica has {width}",
            field="engine.tensor_parallel_size" if config.threads is None else "engine.threads",
            fix=f"set engine.tensor_parallel_size={width} or less, or give replicas more cores (engine.threads, engine.resources)",
        )
    start = neighbours.index(index) * width
    mine = [cores[(start + i) % len(cores)] for i in range(width)]
    bounds = [width * worker // workers for worker in range(workers + 1)]
    return [mine[first:last] for first, last in pairwise(bounds)]


def check_division(config: EngineConfig, model: Mapping[str, Any]) -> None:
    """Tensor parallelism gives each worker an equal part of every layer.

    Args:
        config: the engine section.
        model: the contents of config.json.

    Raises:
        ConfigError: naming what cannot be divided.
    """
    size, text = config.tensor_parallel_size, _text(model)
    for key in ("num_attention_heads", "intermediate_size", "moe_intermediate_size"):
        count = text.get(key)
        if isinstance(count, int) and count % size:
            raise _indivisible(key, count, size)
    heads = _kv_heads(text)
    if heads is not None and heads % size and size % heads:  # fewer heads than workers are given to several of them
        raise _indivisible("num_key_value_heads", heads, size)


def _indivisible(key: str, count: int, size: int) -> ConfigError:
    return ConfigError(
        f"is {size}, which does not divide the model's {key} of {count}",
        field="engine.tensor_parallel_size",
        fix="choose a divisor of it, or set it to 1 and use engine.replicas",
    )


def check_kv_cache(config: VllmConfig, model: Mapping[str, Any], max_model_len: int) -> None:
    """On CPU the KV cache has a fixed size; one sequence of the longest kind must fit into it, or it could never be finished.

    Args:
        config: the engine section.
        model: the contents of config.json.
        max_model_len: longest prompt plus response.

    Raises:
        ConfigError: if `engine.kv_cache_gib` is too small.
    """
    per_token = _kv_bytes_per_token(config, _text(model))
    if per_token is None:
        return
    # vLLM keeps one block of the cache for itself.
    needed = per_token * CPU_BLOCK * (ceil(max_model_len / CPU_BLOCK) + 1)
    if needed > config.kv_cache_gib * GIB:
        smallest = ceil(needed / GIB * 1000) / 1000
        raise ConfigError(
            f"is {config.kv_cache_gib:g}, and one sequence of {max_model_len} tokens needs {smallest:g}",
            field="engine.kv_cache_gib",
            fix="raise it (all sequences that are generated at once share it), or lower sampling.max_new_tokens or prompts.max_tokens",
        )


def _kv_bytes_per_token(config: EngineConfig, text: Mapping[str, Any]) -> int | None:
    """Of one worker; None for a model that does not keep keys and values of all heads for all tokens."""
    windowed = text.get("sliding_window") and text.get("use_sliding_window", True)
    mixed = any(kind != "full_attention" for kind in text.get("layer_types") or ())
    layers: int | None = text.get("num_hidden_layers")
    heads: int | None = text.get("num_attention_heads")
    kv_heads = _kv_heads(text)
    if windowed or mixed or "kv_lora_rank" in text or not (layers and heads and kv_heads):
        return None
    head_dim: int = text.get("head_dim") or text["hidden_size"] // heads
    width = 4 if config.dtype == "float32" else 2
    return 2 * layers * max(1, kv_heads // config.tensor_parallel_size) * head_dim * width


def _kv_heads(text: Mapping[str, Any]) -> int | None:
    found = text.get("num_key_value_heads") or text.get("num_attention_heads")
    return found if isinstance(found, int) else None


def _text(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the language model, where a model can do more."""
    nested = model.get("text_config")
    return nested if isinstance(nested, Mapping) else model
