"""An oracle with weights, in processes of its own."""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from typing import Any

import ray
from pydantic import PrivateAttr
from ray.exceptions import RayTaskError

from onlinerl import hardware
from onlinerl.cluster.runtime import Cluster, get
from onlinerl.errors import OracleError
from onlinerl.protocols.oracle import ModelOracle, Oracle
from onlinerl.protocols.refreshing import Reloads
from onlinerl.types import Failure, Query, Verdict


@ray.remote
class OracleActor:
    """One copy of the oracle."""

    def open(self, oracle: ModelOracle) -> str:
        """Load the weights. Returns the oracle's version."""
        self._oracle = oracle
        if oracle.device == "cpu":
            import torch

            torch.set_num_threads(oracle.threads or max(1, len(os.sched_getaffinity(0)) // oracle.replicas))
        oracle.open()
        return oracle.version

    def reload(self, path: str) -> str:
        """Load other weights. Returns the oracle's version, which is another one."""
        self._oracle.reload(path)
        self._oracle.open()
        return self._oracle.version

    def ask(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """Checked answers, one per query."""
        return list(self._oracle.ask(queries))


def placed(cluster: Cluster, first: int, oracle: Oracle) -> Oracle:
    """The same, with every oracle with weights in it begun to load in processes of its own.

    Args:
        cluster: with room for them, as `placement.plan` asks for it.
        first: index of the first one's placement; the others follow.
        oracle: as configured.
    """
    taken = first

    def put(each: Oracle) -> Oracle:
        nonlocal taken
        if isinstance(each, ModelOracle):
            taken += each.replicas
            return PlacedOracle.start(cluster, taken - each.replicas, each)
        inner = each.inner()
        return each.with_inner({key: put(one) for key, one in inner.items()}) if inner else each

    return put(oracle)


class PlacedOracle(Oracle):
    """The replicas of an oracle as one that takes as many calls at once: each goes to a replica that is free."""

    _actors: dict[str, Any] = PrivateAttr(default_factory=dict)
    _opened: dict[str, Any] = PrivateAttr(default_factory=dict)
    _free: queue.SimpleQueue[str] = PrivateAttr(default_factory=queue.SimpleQueue)
    _start_timeout_s: float = PrivateAttr(0.0)
    _follows: bool = PrivateAttr(False)

    @classmethod
    def start(cls, cluster: Cluster, first: int, oracle: ModelOracle) -> PlacedOracle:
        """Begin to load; `open` waits for it. `first` is the index of the first replica's placement."""
        placed = cls(
            groups_per_call=oracle.groups_per_call,
            max_concurrent=oracle.replicas,
            call_timeout_s=oracle.call_timeout_s,
            retries=oracle.retries,
            preference_temperature=oracle.preference_temperature,
        )
        # What `auto` means was decided when the room was reserved.
        device = "cuda" if cluster.placements[first].gpus else "cpu"
        local = oracle.model_copy(update={"device": device})
        env = {"TOKENIZERS_PARALLELISM": "false", **(hardware.keeping_memory() if device == "cpu" else {})}
        placed._start_timeout_s = oracle.start_timeout_s
        placed._follows = oracle.following is not None
        for i in range(oracle.replicas):
            options = cluster.options(first + i, env)
            placed._actors[f"oracle {i}"] = OracleActor.options(**options).remote()  # type: ignore[attr-defined]
            placed._free.put(f"oracle {i}")
        placed._opened = {name: actor.open.remote(local) for name, actor in placed._actors.items()}
        return placed

    def open(self) -> None:
        """Return once every replica has loaded its weights.

        Raises:
            OracleError: with the replica's own error.
        """
        get(self._opened, timeout_s=self._start_timeout_s, error=OracleError, what="loading the oracle")

    def reload(self, path: str) -> None:
        """Return once every replica has loaded these weights. Nobody may ask meanwhile.

        Raises:
            OracleError: with the replica's own error.
        """
        self._opened = {name: actor.reload.remote(path) for name, actor in self._actors.items()}
        self.open()

    @property
    def following(self) -> Reloads | None:
        """Itself, if the oracle inside takes on the weights of the iterate that each iteration samples from."""
        return self if self._follows else None

    @property
    def version(self) -> str:
        """That of the oracle inside."""
        opened: list[str] = get(self._opened, timeout_s=self._start_timeout_s, error=OracleError, what="loading the oracle")
        return opened[0]

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One result per query, in order, by one replica.

        Raises:
            OracleError: if its process died, or the oracle raised one.
        """
        name = self._free.get()
        refs = {name: self._actors[name].ask.remote(queries)}
        try:
            # Whoever asked has this deadline once and gives up first.
            answers: list[list[Verdict | Failure]] = get(
                refs, timeout_s=2 * self.call_timeout_s, error=OracleError, what="judging"
            )
            return answers[0]
        except OracleError as error:
            failure = error.__cause__
            if isinstance(failure, RayTaskError) and not isinstance(failure.cause, OracleError):
                raise failure.cause from None  # as if it had been raised here
            raise
        finally:
            self._free.put(name)

    def close(self) -> None:
        """End all replicas."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
