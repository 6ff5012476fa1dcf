"""The learner of a reward model: one rank in this process, or ranks on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from onlinerl import hardware
from onlinerl.config.reward_model import RewardConfig, on_cpu
from onlinerl.errors import ConfigError
from onlinerl.protocols.learner import RankSettings

if TYPE_CHECKING:
    from onlinerl.learners._group import RankGroup


@contextmanager
def started(config: RewardConfig) -> Iterator[RankGroup]:
    """The learner, with the model loaded; it ends with the block."""
    with _alone(config) if in_this_process(config) else _on_cluster(config) as learner:
        yield learner


def in_this_process(config: RewardConfig) -> bool:
    """Whether there is no need for Ray."""
    return config.learner.ranks == 1 and config.cluster.address is None


@contextmanager
def _alone(config: RewardConfig) -> Iterator[RankGroup]:
    from onlinerl.learners._local import LocalGroup

    device: Literal["cpu", "cuda"] = "cpu" if on_cpu(config) else "cuda"
    if device == "cuda" and not hardware.has_gpu():
        raise ConfigError("this machine has no GPU", field="cluster.device", fix="set it to cpu or auto")
    settings = RankSettings(
        model=config.model,
        algorithm=config.reward_model,
        training=config.training,
        world_size=1,
        device=device,
        temperature=1.0,
        seed=config.seed,
    )
    learner = LocalGroup(config.learner, settings)
    try:
        yield learner
    finally:
        learner.shutdown()


@contextmanager
def _on_cluster(config: RewardConfig) -> Iterator[RankGroup]:
    from onlinerl.cluster.colocation import Turns
    from onlinerl.cluster.group import LearnerGroup
    from onlinerl.cluster.runtime import Cluster

    with Cluster(config) as cluster:
        turns = Turns(shared=False)
        turns.turn = "learner"  # there is no engine that could have it
        learner = LearnerGroup(cluster, config, config.reward_model, 1.0, turns)
        try:
            learner.wait_started()
            yield learner
        finally:
            learner.shutdown()
