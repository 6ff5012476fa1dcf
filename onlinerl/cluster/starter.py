"""How a replica is started, the first time and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from ray.util.placement_group import PlacementGroup

from onlinerl.cluster.delivery import Delivered
from onlinerl.cluster.replica import Replica, all_of
from onlinerl.cluster.runtime import Cluster
from onlinerl.errors import EngineError, SyncError
from onlinerl.protocols.engine import EngineConfig, EngineReplica, Place, ReplicaSettings


class Starter(Protocol):
    """How a replica is started."""

    def reserve(self, index: int) -> None:
        """See that there is room.

        Raises:
            ClusterError: if there is none.
        """
        ...

    def release(self, index: int) -> None:
        """The room is not needed any more."""
        ...

    def open(self, replica: Replica) -> None:
        """Start its process; returns at once."""
        ...

    def load(self, replica: Replica) -> None:
        """Return once it has loaded the model.

        Raises:
            EngineError: with its own error.
        """
        ...

    def restore(self, replica: Replica, delivered: Delivered) -> float:
        """Give it a version from disk and let it prove it; returns the gap on the canary.

        Raises:
            OnlineRLError: if it cannot.
        """
        ...


class ClusterStarter:
    """Starts replicas of one model on a cluster; a `Starter`.

    Args:
        cluster: where they run.
        first: index of the first replica's placement.
        model: directory or hub id.
        config: the engine section.
        settings: of every replica.
    """

    def __init__(self, cluster: Cluster, first: int, model: str, config: EngineConfig, settings: ReplicaSettings) -> None:
        self._cluster, self._first, self._model, self._config, self._settings = cluster, first, model, config, settings
        self._env = {**config.environment(), **settings.transport.environment()}
        self._rooms: dict[int, PlacementGroup] = {}
        self._places: dict[int, Place] = {}
        self.weights_of: Callable[[int], Path | str] = lambda version: model
        """Where the weights of a version lie on disk."""
        self.learner_dtype = "float32"
        """What the learner rounds its weights to."""
        self.timeout_s = 300.0
        """Longest time in which a replica is given its weights from disk and proves it."""

    def open(self, replica: Replica) -> None:
        """Start its process."""
        more = {"max_concurrency": 1000}
        if (room := self._rooms.get(replica.index)) is not None:
            replica.open(self._cluster.options_in(room, self._first, self._env, **more))
        else:
            replica.open(self._cluster.options(self._first + replica.index, self._env, **more))

    def reserve(self, index: int) -> None:
        """The first replicas have their room for the whole run; later ones need one more."""
        if index >= self._config.replicas:
            self._rooms[index] = self._cluster.reserve_like(self._first)

    def release(self, index: int) -> None:
        """Give a later one's room back."""
        if (room := self._rooms.pop(index, None)) is not None:
            self._cluster.release(room)

    def load(self, replica: Replica) -> None:
        """Load the model, beside the replicas that are there."""
        name = replica.name
        (self._places[replica.index],) = all_of(
            {name: replica.place().future()}, self._config.start_timeout_s, EngineError, "starting the process"
        )
        beside = sorted(self._places)
        places = [self._places[index] for index in beside]
        started = replica.start(self._model, self._config, self._settings, places, beside.index(replica.index))
        all_of({name: started}, self._config.start_timeout_s, EngineError, "starting the engine")
        self.remember([replica])

    def remember(self, replicas: list[Replica]) -> None:
        """Note the processes of replicas that have started, for when they must be ended."""
        found = all_of({r.name: r.processes() for r in replicas}, self._config.start_timeout_s, EngineError, "starting")
        for replica, processes in zip(replicas, found, strict=True):
            replica.remember(processes)

    def placed(self, places: Mapping[int, Place]) -> None:
        """Where the first replicas are."""
        self._places.update(places)

    def restore(self, replica: Replica, delivered: Delivered) -> float:
        """Give it a version from disk and let it prove it."""
        deadline = time.monotonic() + self.timeout_s

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        def done(asked: Future[None], what: str) -> None:
            all_of({replica.name: asked}, left(), SyncError, what)

        path, dtypes = str(self.weights_of(delivered.version)), (self.learner_dtype, self._config.dtype)
        done(replica.call(EngineReplica.watch, list(delivered.digests)), "watching")
        done(replica.call(EngineReplica.load_weights, path, delivered.version, dtypes), "loading weights from disk")
        done(replica.call(EngineReplica.reset_caches), "resetting caches")
        gap, failed = delivered.prove([replica], left, known=delivered.version > 0)
        for error in failed.values():
            raise error
        return gap
