"""The ranks of the learner as one Learner."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from onlinerl.cluster.colocation import Turn, Turns
from onlinerl.cluster.runtime import Cluster, explained, get
from onlinerl.config import RunConfig
from onlinerl.config.reward_model import RewardConfig
from onlinerl.errors import LearnerError, LearnerLost, OnlineRLError
from onlinerl.learners._group import RankGroup
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.learner import LearnerConfig, LearnerRank, RankSettings

T = TypeVar("T")
LOST_S = 10.0
"""How long after the failure of one rank it may take until it is known that another one is gone."""


@ray.remote
class RankActor:
    """A rank in a process of its own."""

    def host(self, timeout_s: float) -> tuple[str, int]:
        """Rank 0 only: open the place where the ranks meet. Returns its address and port."""
        from datetime import timedelta

        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        return address, self._store.port

    def start(self, address: str, port: int, rank: int, config: LearnerConfig, settings: RankSettings) -> None:
        """Meet the others and load the model."""
        from datetime import timedelta

        from torch.distributed import TCPStore

        timeout = timedelta(seconds=config.start_timeout_s)
        store = self._store if rank == 0 else TCPStore(address, port, timeout=timeout)
        self._rank: LearnerRank = config.rank(settings, rank=rank, store=store, address=address)

    def call(self, method: str, *args: Any) -> Any:
        """A method of the rank, by its name in `LearnerRank`; `LearnerGroup.call` is how it is asked for."""
        return getattr(self._rank, method)(*args)


class LearnerGroup(RankGroup):
    """Ranks in processes of their own; a `protocols.learner.Learner`.

    Args:
        cluster: where the ranks run.
        config: of the run.
        algorithm: whose loss is minimised.
        temperature: at which the loss takes log-probs.
        turns: with the engine, on shared GPUs.
    """

    def __init__(
        self, cluster: Cluster, config: RunConfig | RewardConfig, algorithm: Algorithm, temperature: float, turns: Turns
    ) -> None:
        super().__init__(config.learner, algorithm, config.model)
        self._turns = turns
        ranks = config.learner.ranks
        threads = config.learner.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
        env = config.learner.environment(cluster.device, threads)
        self.names = [f"learner rank {i}" for i in range(ranks)]
        self.actors = [
            RankActor.options(**cluster.options(i, env)).remote()  # type: ignore[attr-defined]
            for i in range(ranks)
        ]
        timeout_s = config.learner.start_timeout_s
        self.address, port = get(
            self.actors[0].host.remote(timeout_s), timeout_s=timeout_s, error=LearnerError, what="starting"
        )
        settings = RankSettings(
            model=config.model,
            algorithm=algorithm,
            training=config.training,
            world_size=ranks,
            device=cluster.device,
            temperature=temperature,
            seed=config.seed,
        )
        self._started = {
            n: a.start.remote(self.address, port, i, config.learner, settings)
            for i, (n, a) in enumerate(zip(self.names, self.actors, strict=True))
        }

    def wait_started(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Return once every rank has loaded the model.

        Args:
            meanwhile: called now and then; what it raises ends the waiting.

        Raises:
            LearnerError: with the rank's own error.
        """
        limit = self._config.start_timeout_s
        get(self._started, timeout_s=limit, error=LearnerError, what="starting the learner", meanwhile=meanwhile)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.actors)

    def call(self, method: Callable[..., T], *args: Any, timeout_s: float | None = None, turn: Turn = "learner") -> list[T]:
        """The same method of `LearnerRank` with the same arguments on every rank."""
        return self.scatter(method, [args] * len(self.actors), timeout_s=timeout_s, turn=turn)

    def scatter(
        self,
        method: Callable[..., T],
        arguments: Sequence[tuple[Any, ...]],
        timeout_s: float | None = None,
        turn: Turn = "learner",
    ) -> list[T]:
        """The same method on every rank, each with its own arguments. `turn`: when it may happen (`both`: during a push)."""
        self._turns.need(turn)
        return self._on_all(method, arguments, timeout_s)

    def offload(self, what: str, timeout_s: float | None = None) -> None:
        """Give the GPUs' memory to the engine: "optimizer" is all but the policy's weights, "all" is all."""
        self._on_all(LearnerRank.offload, [(what,)] * len(self.actors), timeout_s)

    def reload(self, timeout_s: float | None = None) -> None:
        """Take it back."""
        self._on_all(LearnerRank.reload, [()] * len(self.actors), timeout_s)

    def _on_all(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], timeout_s: float | None) -> list[T]:
        name = method.__name__
        refs = {n: a.call.remote(name, *args) for n, a, args in zip(self.names, self.actors, arguments, strict=True)}
        # Whoever gives a deadline of its own waits for others too, and knows better whose fault it is when it passes.
        late = LearnerLost if timeout_s is None else LearnerError
        deadline = timeout_s or self._config.step_timeout_s
        try:
            answers: list[T] = get(refs, timeout_s=deadline, error=LearnerError, what=name, lost=LearnerLost, late=late)
            return answers
        except LearnerLost:
            raise
        except OnlineRLError:
            # A rank often fails because another one is gone, and says so first.
            _require_alive(refs, name)
            raise

    def shutdown(self) -> None:
        """End all ranks."""
        refs = [a.call.remote(LearnerRank.shutdown.__name__) for a in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=10)
        for actor in self.actors:
            ray.kill(actor)


def _require_alive(refs: Mapping[str, Any], what: str) -> None:
    """Look whether a rank is gone, once a call to all of them has failed.

    Raises:
        LearnerLost: naming it.
    """
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=LOST_S)
    for name, ref in refs.items():
        try:
            ray.get(ref, timeout=0)
        except RayActorError as gone:
            raise explained(gone, name, what, LearnerError, LearnerLost) from gone
        except (RayError, OnlineRLError):
            continue
