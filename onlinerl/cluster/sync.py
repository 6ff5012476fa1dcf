"""Pushing the learner's weights into every replica, with one deadline, and proving that they arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onlinerl.cluster.colocation import Turns
from onlinerl.cluster.group import LearnerGroup
from onlinerl.cluster.pool import EnginePool, TokenPair
from onlinerl.cluster.runtime import get
from onlinerl.config import EngineConfig, SyncConfig
from onlinerl.errors import OnlineRLError, SyncError
from onlinerl.sync import proof
from onlinerl.types import SyncReport, TrainSequence


class FanOutClient:
    """vLLM's weight-sync control plane for all replicas at once; used by learner rank 0.

    Every call reaches every replica, waits for all of them, and raises the first error with the replica's name. A failed call is
    never swallowed: that is how stale weights go unnoticed (R-A1).
    """

    def __init__(self, actors: Sequence[Any], names: Sequence[str], tensor_parallel_size: int, timeout_s: float) -> None:
        self._actors, self._names, self._width, self._timeout_s = list(actors), list(names), tensor_parallel_size, timeout_s
        self.version = 0
        """What the next finished update will be called."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each replica's workers take the ranks after those of the replica before it."""
        infos = [{**init_info, "rank_offset": 1 + i * self._width} for i in range(len(self._actors))]
        if "rank_offset" not in init_info:  # ipc has no ranks
            infos = [init_info] * len(self._actors)
        self._all("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        """Open an update everywhere."""
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receive everywhere."""
        self._all("update_weights", [update_info] * len(self._actors))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update everywhere, under this push's version."""
        self._all("finish_weight_update", [weight_version or str(self.version)] * len(self._actors))

    def _all(self, method: str, arguments: Sequence[Any] | None = None) -> None:
        args = [()] * len(self._actors) if arguments is None else [(a,) for a in arguments]
        refs = {n: actor.call.remote(method, *a) for n, actor, a in zip(self._names, self._actors, args, strict=True)}
        get(refs, timeout_s=self._timeout_s, error=SyncError, what=method)


def choose_backend(wanted: str, device: str, colocate: bool) -> str:
    """`auto`: gloo on CPU, ipc where learner and replica share a GPU, nccl otherwise."""
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "gloo"
    return "ipc" if colocate else "nccl"


class WeightPush:
    """A `protocols.sync.WeightSync` between a LearnerGroup and an EnginePool.

    Args:
        learner, pool: both ends.
        turns: between them; a push is the one moment at which both have a part of a shared GPU.
        config: the sync section.
        engine: the engine section.
        backend: gloo, nccl or ipc.
        canary: sequences that learner and replicas are compared on.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        pool: EnginePool,
        turns: Turns,
        config: SyncConfig,
        engine: EngineConfig,
        backend: str,
        canary: Sequence[TokenPair],
    ) -> None:
        self._learner, self._pool, self._turns, self._config, self._engine = learner, pool, turns, config, engine
        self._backend, self._canary = backend, list(canary)
        self._open = False
        self._first = True

    def push(self, version: int) -> SyncReport:
        """Send, reset caches, prove.

        Raises:
            SyncError: naming phase and replica, with the replica's own error.
        """
        started = time.monotonic()
        deadline = started + self._config.timeout_s
        marks: dict[str, float] = {}

        def left(phase: str) -> float:
            now = time.monotonic()
            marks.setdefault(phase, now)
            remaining = deadline - now
            if remaining <= 0:
                raise SyncError(
                    f"the push of version {version} used up its {self._config.timeout_s:.0f} s before the {phase}",
                    field="sync.timeout_s",
                    fix="raise it if the transfer is just slow (see sync.seconds), otherwise look at the network",
                )
            return remaining

        def learner(method: str, *args: Any) -> Any:
            return self._learner.call(method, *args, timeout_s=left("push"), turn="both")[0]

        try:
            # The learner's half of the proof comes first: later it may have given its memory away.
            self._turns.move("learner", left("canary"))
            ours = self._learner.score(self._canary_sequences(), timeout_s=left("canary"))
            self._turns.move("both", left("push"))
            if not self._open:  # with the engine awake: a half-open update that is given up writes to its weights
                self._connect(left("push"))
            sample = proof.rotation(learner("parameter_names"), self._config.tensors_checked, version, everything=self._first)
            self._pool.call("watch", sample, timeout_s=left("push"))
            learner("send_weights", version)
            sent, sent_bytes = learner("digests", sample), learner("wire_bytes")
            self._turns.move("engine", left("push"))
            self._pool.call("reset_caches", timeout_s=left("cache_reset"))
            canary_gap = self._prove(version, sent, ours, left)
        except OnlineRLError as error:
            self._open = False  # a half-open update is never reused (R-A4)
            raise SyncError(
                f"the push of version {version} failed: {error.cause}", field=error.field or "sync", fix=error.fix
            ) from error
        self._first = False
        end = time.monotonic()
        return SyncReport(
            version=version,
            seconds=end - started,
            bytes=sent_bytes,
            replicas=len(self._pool.actors),
            backend=self._backend,
            phases={
                "push": marks["cache_reset"] - marks["push"],
                "cache_reset": marks["proof"] - marks["cache_reset"],
                "proof": end - marks["proof"] + marks["push"] - marks["canary"],
            },
            proved=True,
            tensors_checked=len(sample),
            canary_nats=canary_gap,
        )

    def _canary_sequences(self) -> list[TrainSequence]:
        return [TrainSequence(prompt_ids=tuple(p), response_ids=tuple(r)) for p, r in self._canary]

    def _prove(self, version: int, sent: Mapping[str, str], ours: Sequence[np.ndarray], left: Callable[[str], float]) -> float:
        names = self._pool.names
        proof.check_version(version, self._pool.call("weight_version", timeout_s=left("proof")), names)
        proof.check_digests(sent, self._pool.call("received", timeout_s=left("proof")), names)
        theirs = self._pool.score_all(self._canary, timeout_s=left("proof"))
        return proof.check_canary(ours, theirs, names, self._config.canary_tolerance_nats)

    def _connect(self, timeout_s: float) -> None:
        client = FanOutClient(self._pool.actors, self._pool.names, self._engine.tensor_parallel_size, timeout_s)
        port = self._learner.free_port() if self._backend == "nccl" else 0
        infos = [self._init_info(rank, port) for rank in range(len(self._learner.actors))]
        arguments = [(info, client, self._engine.dtype) for info in infos]
        self._learner.scatter("open_sync", arguments, timeout_s=timeout_s, turn="both")
        self._open = True

    def _init_info(self, rank: int, port: int) -> Any:
        world_size = 1 + len(self._pool.actors) * self._engine.tensor_parallel_size
        address = self._learner.address
        bucket_bytes = self._config.bucket_mib * 2**20
        if self._backend == "gloo":
            from onlinerl.sync.gloo import GlooTrainerInitInfo

            return GlooTrainerInitInfo(
                rank=rank,
                master_address=address,
                world_size=world_size,
                bucket_bytes=bucket_bytes,
                timeout_s=self._config.timeout_s,
            )
        from onlinerl.sync import ipc, nccl

        if self._backend == "ipc":
            return ipc.init_info(rank, bucket_bytes)
        return nccl.init_info(rank, address, port, world_size, bucket_bytes)
