"""Several replicas as one RolloutEngine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress

import numpy as np

from onlinerl.cluster.colocation import Turns
from onlinerl.cluster.fleet import Fleet
from onlinerl.cluster.handout import Handout
from onlinerl.cluster.replica import Replica, TokenPair, all_of, outcomes
from onlinerl.cluster.runtime import Cluster
from onlinerl.cluster.starter import ClusterStarter
from onlinerl.cluster.states import ReplicaState
from onlinerl.errors import EngineError, OnlineRLError
from onlinerl.protocols.engine import EngineConfig, EngineReplica, ReplicaSettings
from onlinerl.types import Group, Request, Sampling


class EnginePool:
    """Replicas that pull prompts from one shared queue.

    Args:
        cluster: where they run.
        first: index of the first replica's placement.
        model: directory or hub id.
        config: the engine section.
        settings: of every replica.
        turns: with the learner, on shared GPUs.
    """

    def __init__(
        self, cluster: Cluster, first: int, model: str, config: EngineConfig, settings: ReplicaSettings, turns: Turns
    ) -> None:
        self._config, self._turns = config, turns
        self.starter = ClusterStarter(cluster, first, model, config, settings)
        self.fleet = Fleet(config, self.starter)
        self.wanted: Callable[[], int | None] = lambda: None
        """How many replicas somebody has asked for since the last look."""
        self._starting = list(self.fleet.replicas)
        for replica in self._starting:
            self.starter.open(replica)
        # Each learns where all of them are, to share the cores of its own machine; Ray hands the answers over when they are there.
        self._placed = {r.name: r.place() for r in self._starting}
        places = list(self._placed.values())
        self._started = {r.name: r.start(model, config, settings, places, i) for i, r in enumerate(self._starting)}
        self._waiting = threading.Lock()

    def wait_started(self) -> None:
        """Return once every replica has loaded its model.

        Raises:
            EngineError: with the replica's own error.
        """
        if not self._starting:  # for an earlier run
            return
        timeout_s = self._config.start_timeout_s
        placed = {name: ref.future() for name, ref in self._placed.items()}
        places = all_of(placed, timeout_s, EngineError, "starting the process")
        all_of(self._started, timeout_s, EngineError, "starting the engine")
        self.starter.placed({r.index: place for r, place in zip(self._starting, places, strict=True)})
        self.starter.remember(self._starting)
        for replica in self._starting:
            replica.to(ReplicaState.STALE)
        self._starting = []

    def begin_run(self, turns: Turns) -> None:
        """Work for another run, which takes turns with another learner."""
        self._turns = turns
        self.fleet.begin_run()

    def require_starting(self) -> None:
        """Refuse to go on if a replica has failed to load its model; returns at once.

        Raises:
            EngineError: with the replica's own error.
        """
        failed = {name: future for name, future in self._started.items() if future.done() and future.exception() is not None}
        all_of(failed, 0, EngineError, "starting the engine")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Group]]:
        """Groups as they finish, those together that have finished meanwhile. The prompts of a replica that fails are asked again, with their seeds.

        Raises:
            EngineError: if too few replicas are left, or a prompt cannot be answered.
        """
        self._turns.need("engine")
        for groups in Handout(self.fleet, requests, sampling, self._config).groups():
            self.look()
            yield groups

    def look(self) -> None:
        """See whether somebody has asked for more or fewer replicas."""
        with self._waiting:
            wanted = self.wanted()
        if wanted is not None:
            self.fleet.resize(wanted)

    def logprobs(self, sequences: Sequence[TokenPair]) -> list[np.ndarray]:
        """Log-probs by one replica."""
        self._turns.need("engine")
        replica = (self.fleet.able() or self.fleet.replicas)[0]
        futures = {replica.name: replica.logprobs(sequences)}
        return all_of(futures, self._config.generate_timeout_s, EngineError, "log-probs")[0]

    def sleep(self, timeout_s: float | None = None) -> None:
        """Give the GPUs' memory to the learner: weights to host memory, KV caches dropped, nothing left of replicas that were lost."""
        timeout_s = timeout_s or self._config.start_timeout_s
        self.fleet.settle(timeout_s)
        replicas = self.fleet.move(ReplicaState.ASLEEP)
        self._done_or_lost({r: r.call(EngineReplica.sleep) for r in replicas}, "going to sleep", timeout_s)
        self.fleet.settle(timeout_s)

    def wake_up(self, what: str, timeout_s: float | None = None) -> None:
        """Take memory back: "weights" before a push, "kv_cache" after it, or "all" where nothing was pushed."""
        if what == "kv_cache":  # they are in the middle of an update
            replicas = [r for r in self.fleet.replicas if r.state is ReplicaState.UPDATING]
        else:
            replicas = self.fleet.move(ReplicaState.STALE if what == "weights" else ReplicaState.SERVING)
        tags = None if what == "all" else [what]
        asked = {r: r.call(EngineReplica.wake_up, tags) for r in replicas}
        self._done_or_lost(asked, "waking up", timeout_s or self._config.start_timeout_s)
        if what != "weights":  # then the learner has some of its own on the GPUs still
            self.fleet.allow_starts()

    def _done_or_lost(self, asked: Mapping[Replica, Future[None]], what: str, timeout_s: float) -> None:
        """Those that are gone are given up; one that is there and cannot do it ends the run."""
        answers = outcomes({r.name: future for r, future in asked.items()}, timeout_s, EngineError, what)
        failed = {r: answer for r in asked if isinstance(answer := answers[r.name], OnlineRLError)}
        gone = self.fleet.silent(list(failed)) if self.fleet.heals else {}
        for replica, error in failed.items():
            if replica not in gone:
                raise error
        for replica, error in failed.items():
            self.fleet.lost(replica, replica.actor, "died", error)

    def shutdown(self) -> None:
        """End all replicas; one that does not answer is killed, with all that it had started."""
        there = self.fleet.close()
        asked = {r: r.call(EngineReplica.shutdown) for r in there if r.state is not ReplicaState.DEAD}
        wait(asked.values(), timeout=20)
        for replica in there:
            if replica in asked and asked[replica].done():
                replica.kill()
            else:
                with suppress(EngineError):  # the run is over, and whatever ended it is on its way to the user
                    replica.end()
