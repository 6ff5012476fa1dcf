"""Pushing the learner's weights into every replica, with one deadline, and proving that they arrived."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from onlinerl.cluster.colocation import Turns
from onlinerl.cluster.delivery import Delivered
from onlinerl.cluster.group import LearnerGroup
from onlinerl.cluster.pool import EnginePool
from onlinerl.cluster.replica import Replica, TokenPair, all_of
from onlinerl.cluster.runtime import get
from onlinerl.config import EngineConfig, SyncConfig
from onlinerl.errors import LearnerLost, OnlineRLError, SyncError
from onlinerl.sync import proof
from onlinerl.types import SyncReport, TrainSequence


class FanOutClient:
    """vLLM's weight-sync control plane for all replicas at once; used by learner rank 0.

    Every call reaches every replica, waits for all of them, and raises the first error with the replica's name. A failed call is
    never swallowed: that is how stale weights go unnoticed.
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
        self._fleet = pool.fleet
        self._members: list[Replica] = []
        """Who takes part in the push that is under way."""
        self._unproved: dict[Replica, OnlineRLError] = {}
        """Which of them could not prove that the weights arrived."""
        self._connected: list[Any] = []
        """The processes of the replicas that the learner has a connection to."""
        self._first = True

    def push(self, version: int) -> SyncReport:
        """Send, reset caches, prove. Where a replica has failed, everything is sent again to the others.

        Raises:
            SyncError: naming phase and replica, with the replica's own error.
            LearnerLost: if a rank is gone.
        """
        self._pool.look()
        while True:
            self._members, self._unproved = [], {}
            try:
                return self._attempt(version, _Deadline(version, self._config.timeout_s))
            except LearnerLost:
                raise
            except OnlineRLError as error:
                self._connected = []  # a half-open update is never reused
                blamed = self._failed()
                if not blamed:
                    raise SyncError(
                        f"the push of version {version} failed: {error.cause}", field=error.field or "sync", fix=error.fix
                    ) from error
                for replica, reason in blamed.items():
                    self._fleet.lost(replica, replica.actor, "push", reason)

    def _failed(self) -> dict[Replica, OnlineRLError]:
        """Whom to do without next time, and why; nobody if it is not the replicas, or none of them can be replaced."""
        self._fleet.end_update(self._members, None)
        if not self._fleet.heals:
            return {}
        some = len(self._unproved) < len(self._members)
        return self._fleet.silent(self._members) or (self._unproved if some else {})

    def _attempt(self, version: int, left: _Deadline) -> SyncReport:
        def learner(method: str, *args: Any) -> Any:
            return self._learner.call(method, *args, timeout_s=left("push"), turn="both")[0]

        # The learner's half of the proof comes first: later it may have given its memory away.
        self._turns.move("learner", left("canary"))
        ours = self._learner.logprobs(self._canary_sequences(), timeout_s=left("canary"))
        self._turns.move("both", left("push"))
        with left.paused():
            self._members = members = self._fleet.begin_update()
        if self._connected != [r.actor for r in members]:
            # With the engine awake: a half-open update that is given up writes to its weights.
            self._connect(members, left("push"))
        sample = proof.rotation(learner("parameter_names"), self._config.tensors_checked, version, everything=self._first)
        self._all("watch", left("push"), sample)
        learner("send_weights", version)
        sent, sent_bytes = learner("digests", sample), learner("wire_bytes")
        self._turns.move("engine", left("push"))
        self._all("reset_caches", left("cache_reset"))
        delivered = Delivered(
            version=version,
            digests=sent,
            canary=self._canary,
            logprobs=ours,
            tolerance=self._config.canary_tolerance_nats,
        )
        gap, failed = delivered.prove(members, lambda: left("proof"))
        self._unproved = {r: failed[r.name] for r in members if r.name in failed}
        for reason in self._unproved.values():
            raise reason
        self._fleet.end_update(members, delivered)
        self._first = False
        return SyncReport(
            version=version,
            bytes=sent_bytes,
            replicas=len(members),
            backend=self._backend,
            **left.spent(),
            proved=True,
            tensors_checked=len(sample),
            canary_nats=gap,
        )

    def _canary_sequences(self) -> list[TrainSequence]:
        return [TrainSequence(prompt_ids=tuple(p), response_ids=tuple(r)) for p, r in self._canary]

    def _all(self, method: str, timeout_s: float, *args: Any) -> None:
        all_of({r.name: r.call(method, *args) for r in self._members}, timeout_s, SyncError, method)

    def _connect(self, members: Sequence[Replica], timeout_s: float) -> None:
        self._connected = []
        actors = [replica.actor for replica in members]
        width = self._engine.tensor_parallel_size
        client = FanOutClient(actors, [replica.name for replica in members], width, timeout_s)
        port = self._learner.free_port() if self._backend == "nccl" else 0
        infos = [self._init_info(rank, port, 1 + len(actors) * width) for rank in range(len(self._learner.actors))]
        arguments = [(info, client, self._engine.dtype) for info in infos]
        self._learner.scatter("open_sync", arguments, timeout_s=timeout_s, turn="both")
        self._connected = actors

    def _init_info(self, rank: int, port: int, world_size: int) -> Any:
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


class _Deadline:
    """One deadline for a whole push. Called with the name of a phase, it says how many seconds are left, and that the phase has begun."""

    def __init__(self, version: int, timeout_s: float) -> None:
        self._version, self._timeout_s = version, timeout_s
        self._started = time.monotonic()
        self._marks: dict[str, float] = {}
        self._waited = 0.0

    def __call__(self, phase: str) -> float:
        now = time.monotonic()
        self._marks.setdefault(phase, now)
        remaining = self._started + self._waited + self._timeout_s - now
        if remaining <= 0:
            raise SyncError(
                f"the push of version {self._version} used up its {self._timeout_s:.0f} s before the {phase}",
                field="sync.timeout_s",
                fix="raise it if the transfer is just slow (see sync.seconds), otherwise look at the network",
            )
        return remaining

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While replicas are waited for that are being started again, which has a deadline of its own."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def spent(self) -> dict[str, Any]:
        """What a report says about time: all of it, and the parts."""
        end, marks = time.monotonic(), self._marks
        parts = {
            "push": marks["cache_reset"] - marks["push"],
            "cache_reset": marks["proof"] - marks["cache_reset"],
            "proof": end - marks["proof"] + marks["push"] - marks["canary"],
        }
        return {"seconds": end - self._started, "phases": parts}
