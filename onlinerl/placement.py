"""What a run asks of a cluster, as plain arithmetic: who needs which resources, and which of them must be neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onlinerl import config as configuration
from onlinerl.config import RunConfig
from onlinerl.config.reward_model import RewardConfig
from onlinerl.errors import ClusterError, ConfigError
from onlinerl.protocols.oracle import with_weights

NOTHING = {"memory": 1.0}
"""What is reserved for who needs nothing: Ray wants a positive amount of something. One byte is always there; any share of a core would be too
much where the others have all of them."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One actor's share of the cluster."""

    role: str
    """For people, e.g. "learner rank 0"."""
    cpus: float
    gpus: float
    resources: Mapping[str, float]
    bundle: int
    """Which reservation it lives in. Two actors in one bundle are on one node, and on one GPU if that is what the bundle has."""


def bundles(placements: Sequence[Placement]) -> list[dict[str, float]]:
    """What Ray reserves, in the order of `Placement.bundle`; Ray wants at least one positive entry in each."""
    wanted: list[Counter[str]] = [Counter() for _ in range(1 + max(p.bundle for p in placements))]
    for p in placements:
        wanted[p.bundle].update({"CPU": p.cpus, "GPU": p.gpus, **p.resources})
    return [{k: float(v) for k, v in one.items() if v > 0} or dict(NOTHING) for one in wanted]


def plan(config: RunConfig | RewardConfig, device: str) -> list[Placement]:
    """What a run asks of the cluster: learner ranks, replicas of the engine, then of each oracle with weights. The training of a reward
    model asks for ranks only.

    Colocated: rank i and replica i share one bundle and its GPU.
    """
    learner, gpu = config.learner, device == "cuda"
    shared = gpu and config.cluster.colocate
    ranks = [
        Placement(
            role=f"learner rank {i}",
            cpus=learner.cpus,
            gpus=(0.5 if shared else 1) * gpu,
            resources=learner.resources,
            bundle=i,
        )
        for i in range(learner.ranks)
    ]
    if isinstance(config, RewardConfig):
        return ranks
    engine = config.engine
    replicas = [
        Placement(
            role=f"replica {i}",
            cpus=engine.cpus,
            gpus=(0.5 if shared else engine.gpus) * gpu,
            resources=engine.resources,
            bundle=i if shared else learner.ranks + i,
        )
        for i in range(engine.replicas)
    ]
    first = 1 + max(p.bundle for p in ranks + replicas)
    judges = [
        Placement(
            role=f"{section} {i}",
            cpus=oracle.cpus,
            gpus=float(gpu and oracle.device != "cpu"),
            resources=oracle.resources,
            bundle=first,
        )
        for section, oracle in with_weights(configuration.oracle(config)).items()
        for i in range(oracle.replicas)
    ]
    judges = [replace(judge, bundle=first + i) for i, judge in enumerate(judges)]
    return ranks + replicas + judges


def describe(placements: Sequence[Placement]) -> list[str]:
    """One line per bundle: who lives in it and what it holds."""
    return [
        f"{' and '.join(p.role for p in placements if p.bundle == i)}: {_amounts(bundle)}"
        for i, bundle in enumerate(bundles(placements))
    ]


def _amounts(bundle: Mapping[str, float]) -> str:
    return "nothing of its own" if bundle == NOTHING else ", ".join(f"{v:g} {k}" for k, v in bundle.items())


def missing(placements: Sequence[Placement], available: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Resource -> (needed, there) for everything there is too little of."""
    needed: Counter[str] = Counter()
    for bundle in bundles(placements):
        if bundle != NOTHING:
            needed.update(bundle)
    return {k: (v, available.get(k, 0.0)) for k, v in needed.items() if v > available.get(k, 0.0) + 1e-6}


def explain_missing(placements: Sequence[Placement], available: Mapping[str, float]) -> ClusterError | None:
    """The error to raise when a cluster with `available` resources can never hold `placements`, or None."""
    short = missing(placements, available)
    if not short:
        return None
    amounts = ", ".join(f"{need:g} {name} (there are {have:g})" for name, (need, have) in short.items())
    return ClusterError(
        f"the run needs {amounts}. Wanted: {'; '.join(describe(placements))}",
        field="cluster",
        fix="lower engine.replicas, learner.ranks, oracle.replicas or engine.tensor_parallel_size, add nodes, or set engine.cpus=0 learner.cpus=0 "
        "to let them share cores",
    )


def explain_unplaceable(placements: Sequence[Placement], nodes: Sequence[Mapping[str, float]]) -> ClusterError | None:
    """The error to raise when the cluster has enough in all, but no node of it can hold one of the bundles, or None.

    Args:
        placements: what the run asks for.
        nodes: what each node has.
    """
    for line, bundle in zip(describe(placements), bundles(placements), strict=True):
        if bundle != NOTHING and not any(
            all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in bundle.items()) for node in nodes
        ):
            return ClusterError(
                f"no node has all of what must be on one: {line}",
                field="cluster",
                fix="lower engine.tensor_parallel_size to the GPUs of one node, or engine.cpus or learner.cpus; or add such a node",
            )
    return None


def require_fleet(config: RunConfig) -> None:
    """What the numbers of replicas and restarts must agree on.

    Raises:
        ConfigError: naming the field.
    """
    if config.engine.min_replicas > config.engine.replicas:
        raise ConfigError(
            f"is {config.engine.min_replicas}, and there are {config.engine.replicas} replicas: the run would wait for ever",
            field="engine.min_replicas",
            fix="lower it, or raise engine.replicas",
        )
    if config.cluster.colocate and config.engine.max_restarts:
        raise ConfigError(
            f"is {config.engine.max_restarts}, and a replica cannot start while the learner has its GPU",
            field="engine.max_restarts",
            fix="leave it out: on shared GPUs a replica that is lost ends the run, and a resume starts all of them",
        )


def require_shareable(config: RunConfig) -> None:
    """What learner ranks and replicas must agree on to take turns on GPUs (`cluster.colocate`).

    Raises:
        ConfigError: naming the field.
    """
    if config.learner.ranks != config.engine.replicas:
        raise ConfigError(
            f"colocated, each learner rank shares a GPU with one replica, but there are {config.learner.ranks} ranks and {config.engine.replicas} replicas",
            field="cluster.colocate",
            fix="make learner.ranks and engine.replicas equal",
        )
    config.engine.check_shared()


def require_apart(config: RunConfig, *, cores_are_shared: bool) -> None:
    """What an engine needs that samples while the learner trains (`schedule.max_lag`): hardware that the learner does not compute on.

    Raises:
        ConfigError: if they would take turns: responses would be older, and nothing faster.
    """
    if config.schedule.max_lag == 0:
        return
    turns = "and only one of them works at a time: responses would be older, and nothing faster"
    if config.cluster.colocate:
        raise ConfigError(
            f"is 1, but engine and learner share GPUs, {turns}",
            field="schedule.max_lag",
            fix="set it to 0, or cluster.colocate=false where there are GPUs for both",
        )
    if cores_are_shared:
        raise ConfigError(
            f"is 1, but engine and learner compute on the same cores, {turns}",
            field="schedule.max_lag",
            fix="set engine.threads and learner.threads, the cores of each, together no more than there are; or set it to 0",
        )
