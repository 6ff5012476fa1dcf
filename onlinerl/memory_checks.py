"""How much memory a run takes, and whether there is as much."""

from __future__ import annotations

from collections.abc import Mapping

from onlinerl import config as configuration
from onlinerl import hardware
from onlinerl.config import RunConfig

GIB = 2**30


def check_memory(config: RunConfig, parameters: float | None, *, critic: float = 0, adapters: float | None = None) -> list[str]:
    """What each role keeps in memory, and whether this machine has less where all of the run is on it. Arguments as of `estimate`."""
    notes = [estimate(config, parameters, critic=critic, adapters=adapters)]
    here = configuration.runs_on_cpu(config) and config.cluster.address is None and not config.engine.in_process
    there = hardware.memory()
    if parameters is None or not here or there is None:
        return notes
    total, available = there
    engine = config.engine
    of_replica = _engine_weights(config, parameters) + engine.cache_bytes * engine.tensor_parallel_size
    needed = config.learner.ranks * sum(_of_rank(config, parameters, critic, adapters).values()) + engine.replicas * of_replica
    if needed > available:
        notes.append(
            f"memory: with the KV cache these are {needed / GIB:.1f} GiB, and of the {total / GIB:.1f} GiB of this machine {available / GIB:.1f} "
            "are left. When all is used, Ray ends a process, and the run with it: close other programs, or use less (engine.replicas, "
            "engine.kv_cache_gib, learner.zero_stage, learner.lora, a smaller model)"
        )
    return notes


def estimate(config: RunConfig, parameters: float | None, *, critic: float = 0, adapters: float | None = None) -> str:
    """What each role keeps in memory, from the number of parameters: an estimate without activations.

    Args:
        config: the run's.
        parameters: of the model; None if that is not known.
        critic: parameters of a second network that is trained; a value head on the policy's own trunk is nothing beside it.
        adapters: parameters of the adapters of both, which alone are trained; None trains all.
    """
    if parameters is None:
        return "memory: the size of the model is not known, so nothing was estimated"
    ranks, parts = config.learner.ranks, _of_rank(config, parameters, critic, adapters)
    trained = "" if adapters is None else f", {adapters / 1e6:.2f} M of adapters trained"
    of_what = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    replica = _engine_weights(config, parameters) / config.engine.tensor_parallel_size / GIB
    return (
        f"memory (estimate, {parameters / 1e9:.2f} B parameters{trained}): learner {ranks} rank{'s' if ranks > 1 else ''} x "
        f"{sum(parts.values()) / GIB:.1f} GiB ({config.learner.layout}: {of_what}; activations come on top); "
        f"engine {config.engine.replicas} replica{'s' if config.engine.replicas > 1 else ''} x "
        f"{config.engine.tensor_parallel_size} x {replica:.1f} GiB of weights plus KV cache"
    )


def _of_rank(config: RunConfig, parameters: float, critic: float, adapters: float | None) -> Mapping[str, float]:
    """Bytes of one rank of the learner, by what they are for."""
    # A learner that knows no adapters is not told of any.
    return config.learner.memory(parameters, critic=critic, **({} if adapters is None else {"adapters": adapters}))


def _engine_weights(config: RunConfig, parameters: float) -> float:
    """Bytes of the weights of one replica, over all of its workers."""
    return parameters * (4 if config.engine.dtype == "float32" else 2)
