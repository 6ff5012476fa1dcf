"""Several replicas behind one pull queue: a RolloutEngine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from onlinerl.cluster.colocation import Turns
from onlinerl.cluster.runtime import Cluster, get
from onlinerl.engines import _fit
from onlinerl.engines._fit import Place
from onlinerl.errors import EngineError
from onlinerl.protocols.engine import EngineConfig
from onlinerl.types import Group, Request, Sampling

TokenPair = tuple[Sequence[int], Sequence[int]]


@ray.remote
class ReplicaActor:
    """A replica in a process of its own."""

    async def place(self) -> Place:
        """Where Ray has put it."""
        return _fit.this_place()

    async def start(self, model: str, config: EngineConfig, settings: dict[str, Any], index: int, *places: Place) -> None:
        """Load the model; takes tens of seconds. Replica `index` of those at `places`."""
        self._replica = config.replica(model, places, index, settings)

    async def call(self, method: str, *args: Any) -> Any:
        """Any method of the replica."""
        result = getattr(self._replica, method)(*args)
        return await result if hasattr(result, "__await__") else result

    async def generate(self, request: Request, sampling: Sampling) -> Group:
        """All responses to one prompt."""
        return await self._replica.generate(request, sampling)

    async def score(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        """Teacher-forced log-probs."""
        return [await self._replica.score(prompt, response) for prompt, response in pairs]


class EnginePool:
    """Replicas that pull prompts from one shared queue, so that no replica idles while another has a backlog (R-I1).

    Args:
        cluster: where they run.
        first: index of the first replica's placement.
        model: directory or hub id.
        config: the engine section.
        settings: `device`, `max_model_len`, `sync_backend` and `seed` of every replica.
        turns: with the learner, on shared GPUs.
    """

    def __init__(
        self, cluster: Cluster, first: int, model: str, config: EngineConfig, settings: dict[str, Any], turns: Turns
    ) -> None:
        self._config, self._turns = config, turns
        self.names = [f"replica {i}" for i in range(config.replicas)]
        self.actors = []
        for i in range(config.replicas):
            options = cluster.options(first + i, config.environment(settings["sync_backend"]), max_concurrency=1000)
            actor = ReplicaActor.options(**options).remote()  # type: ignore[attr-defined]
            self.actors.append(actor)
        # Each learns where all of them are, to share the cores of its own machine; Ray hands the answers over when they are there.
        self._placed = {n: a.place.remote() for n, a in zip(self.names, self.actors, strict=True)}
        places = self._placed.values()
        self._started = {
            name: actor.start.remote(model, config, settings, i, *places)
            for i, (name, actor) in enumerate(zip(self.names, self.actors, strict=True))
        }

    def wait_started(self) -> None:
        """Return once every replica has loaded its model.

        Raises:
            EngineError: with the replica's own error.
        """
        get(self._placed, timeout_s=self._config.start_timeout_s, error=EngineError, what="starting the process")
        get(self._started, timeout_s=self._config.start_timeout_s, error=EngineError, what="starting the engine")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Groups as they finish.

        Raises:
            EngineError: if a replica fails, or none answers for `engine.generate_timeout_s`.
        """
        self._turns.need("engine")
        queue = deque(requests)
        running: dict[Any, tuple[int, Request]] = {}
        # Enough to keep every slot of a replica busy, plus one prompt that waits at its door.
        depth = [0] * len(self.actors)
        limit = 1 + -(-self._config.max_concurrent // max(1, len(requests[0].seeds))) if requests else 0
        try:
            while queue or running:
                while queue and min(depth) < limit:
                    i, request = depth.index(min(depth)), queue.popleft()
                    running[self.actors[i].generate.remote(request, sampling)] = (i, request)
                    depth[i] += 1
                done, _ = ray.wait(list(running), num_returns=1, timeout=self._config.generate_timeout_s)
                if not done:
                    waiting = sorted({self.names[i] for i, _ in running.values()})
                    raise EngineError(
                        f"no response from {', '.join(waiting)} for {self._config.generate_timeout_s:.0f} s",
                        field="engine.generate_timeout_s",
                        fix="look at those replicas; raise the limit if single responses really take that long",
                    )
                i, _request = running.pop(done[0])
                depth[i] -= 1
                yield get({self.names[i]: done[0]}, timeout_s=60, error=EngineError, what="generating")[0]
        finally:
            for ref in running:  # the caller gave up: do not leave work behind
                ray.cancel(ref, force=False)

    def score(self, sequences: Sequence[TokenPair]) -> list[np.ndarray]:
        """Log-probs by the first replica."""
        return self.score_all(sequences)[0]

    def score_all(self, sequences: Sequence[TokenPair], timeout_s: float | None = None) -> list[list[np.ndarray]]:
        """Log-probs by every replica."""
        self._turns.need("engine")
        refs = {n: a.score.remote(sequences) for n, a in zip(self.names, self.actors, strict=True)}
        return get(refs, timeout_s=timeout_s or self._config.generate_timeout_s, error=EngineError, what="scoring")

    def sleep(self, timeout_s: float | None = None) -> None:
        """Give the GPUs' memory to the learner: weights to host memory, KV caches dropped."""
        self.call("sleep", timeout_s=timeout_s or self._config.start_timeout_s)

    def wake_up(self, what: str, timeout_s: float | None = None) -> None:
        """Take memory back: "weights" before a push, "kv_cache" after it, or "all" where nothing was pushed."""
        tags = None if what == "all" else [what]
        self.call("wake_up", tags, timeout_s=timeout_s or self._config.start_timeout_s)

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """The same method on every replica; all must answer in time."""
        refs = {n: a.call.remote(method, *args) for n, a in zip(self.names, self.actors, strict=True)}
        return get(refs, timeout_s=timeout_s, error=EngineError, what=method)

    def shutdown(self) -> None:
        """End all replicas; one that does not answer is killed."""
        refs = [a.call.remote("shutdown") for a in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=20)
        for actor in self.actors:
            ray.kill(actor)
