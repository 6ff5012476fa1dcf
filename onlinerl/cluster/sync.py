"""Pushing the learner's weights into every replica, with one deadline, and proving that they arrived."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Concatenate

from onlinerl.cluster.colocation import Turns
from onlinerl.cluster.delivery import Delivered
from onlinerl.cluster.group import LearnerGroup
from onlinerl.cluster.pool import EnginePool
from onlinerl.cluster.replica import Arguments, Replica, T, TokenPair, all_of
from onlinerl.cluster.runtime import get
from onlinerl.cluster.states import ReplicaState
from onlinerl.errors import LearnerLost, OnlineRLError, SyncError
from onlinerl.protocols.engine import EngineConfig, EngineReplica
from onlinerl.protocols.learner import LearnerRank
from onlinerl.protocols.transport import Meeting, TransportConfig
from onlinerl.transports import _proof as proof
from onlinerl.types import SyncReport, TrainSequence


class FanOut:
    """All replicas at once, as rank 0 of the learner talks to them; a `protocols.transport.Replicas`.

    A failed call is never swallowed: that is how stale weights go unnoticed.

    Args:
        actors: the replicas' processes.
        names: of the replicas, for messages.
        tensor_parallel_size: workers of each.
        timeout_s: of each call.
    """

    def __init__(self, actors: Sequence[Any], names: Sequence[str], tensor_parallel_size: int, timeout_s: float) -> None:
        self._actors, self._names, self._width, self._timeout_s = list(actors), list(names), tensor_parallel_size, timeout_s
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each replica's workers take the ranks after those of the replica before it."""
        infos = [{**init_info, "rank_offset": 1 + i * self._width} for i in range(len(self._actors))]
        if "rank_offset" not in init_info:  # a transport without ranks
            infos = [init_info] * len(self._actors)
        self._each(EngineReplica.init_weight_transfer_engine, [(info,) for info in infos])

    def start_weight_update(self) -> None:
        """Open an update everywhere."""
        self._all(EngineReplica.start_weight_update)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive everywhere."""
        self._all(EngineReplica.update_weights, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update everywhere, under this push's version."""
        self._all(EngineReplica.finish_weight_update, weight_version or str(self.version))

    def load_weights(self, path: str, version: int, dtypes: Sequence[str]) -> None:
        """Load from disk everywhere."""
        self._all(EngineReplica.load_weights, path, version, dtypes)

    def _all(
        self,
        method: Callable[Concatenate[EngineReplica, Arguments], Awaitable[None]],
        *args: Arguments.args,
        **_: Arguments.kwargs,
    ) -> None:
        self._each(method, [args] * len(self._actors))

    def _each(self, method: Callable[..., Awaitable[None]], arguments: Sequence[tuple[Any, ...]]) -> None:
        name = method.__name__
        refs = {n: actor.call.remote(name, *a) for n, actor, a in zip(self._names, self._actors, arguments, strict=True)}
        get(refs, timeout_s=self._timeout_s, error=SyncError, what=name)


class WeightPush:
    """A `protocols.sync.WeightSync` between a LearnerGroup and an EnginePool.

    Args:
        learner, pool: both ends.
        turns: between them; a push is the one moment at which both have a part of a shared GPU.
        transport: what carries the weights.
        engine: the engine section.
        canary: sequences that learner and replicas are compared on.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        pool: EnginePool,
        turns: Turns,
        transport: TransportConfig,
        engine: EngineConfig,
        canary: Sequence[TokenPair],
    ) -> None:
        self._learner, self._pool, self._turns, self._transport, self._engine = learner, pool, turns, transport, engine
        self._canary = list(canary)
        self._fleet = pool.fleet
        self._members: list[Replica] = []
        """Who takes part in the push that is under way."""
        self._unproved: dict[Replica, OnlineRLError] = {}
        """Which of them could not prove that the weights arrived."""
        self._connected: list[Any] = []
        """The processes of the replicas that the learner has a connection to."""
        self._first = True

    def push(self, version: int, model: str = "policy") -> SyncReport:
        """Send, reset caches, prove. Where a replica has failed, everything is sent again to the others.

        Args:
            version: which the replicas take on.
            model: whose weights: "policy", or the path of a saved model, which the ranks read.

        Raises:
            SyncError: naming phase and replica, with the replica's own error.
            LearnerLost: if a rank is gone.
        """
        self._pool.look()
        while True:
            self._members, self._unproved = [], {}
            try:
                return self._attempt(version, model, _Deadline(version, self._transport.timeout_s))
            except LearnerLost:
                raise
            except OnlineRLError as error:
                self._connected = []  # a half-open update is never reused
                blamed = self._failed()
                if blamed is None:
                    raise SyncError(
                        f"the push of version {version} failed: {error.cause}", field=error.field or "sync", fix=error.fix
                    ) from error
                for replica, reason in blamed.items():
                    self._fleet.lost(replica, replica.actor, "push", reason)

    def _failed(self) -> dict[Replica, OnlineRLError] | None:
        """Whom to do without next time, and why, beside those that were given up on the way; None if it is not the replicas, or none of
        them can be replaced."""
        there = [r for r in self._members if r.state is ReplicaState.UPDATING]
        self._fleet.end_update(self._members, None)
        if not self._fleet.heals or self._turns.turn == "unknown":  # then nothing can be sent again
            return None
        some = len(self._unproved) < len(there)
        blamed = self._fleet.silent(there) or (self._unproved if some else {})
        return blamed if blamed or len(there) < len(self._members) else None

    def _attempt(self, version: int, model: str, left: _Deadline) -> SyncReport:
        def learner(method: Callable[..., T], *args: Any) -> T:
            return self._learner.call(method, *args, timeout_s=left("push"), turn="both")[0]

        # The learner's half of the proof comes first: later it may have given its memory away.
        self._turns.move("learner", left("canary"))
        ours = self._learner.logprobs(self._canary_sequences(), model=model, timeout_s=left("canary"))
        self._turns.move("both", left("push"))
        with left.paused():
            self._members = members = self._fleet.begin_update()
        if self._connected != [r.actor for r in members]:
            # With the engine awake: a half-open update that is given up writes to its weights.
            self._connect(members, left("push"))
        sample = proof.rotation(
            learner(LearnerRank.parameter_names), self._transport.tensors_checked, version, everything=self._first
        )
        self._all([r.call(EngineReplica.watch, sample) for r in members], left("push"), "watching")
        files = self._transport.receiver is None
        learner(LearnerRank.send_weights, version, str(self._pool.starter.weights_of(version)) if files else None, model)
        sent, sent_bytes = learner(LearnerRank.digests, sample, model), learner(LearnerRank.wire_bytes)
        self._turns.move("engine", left("push"))
        self._all([r.call(EngineReplica.reset_caches) for r in members], left("cache_reset"), "resetting caches")
        delivered = Delivered(
            version=version,
            digests=sent,
            canary=self._canary,
            logprobs=ours,
            tolerance=self._transport.canary_tolerance_nats,
        )
        # In its own files the base model may have other names than the learner gives it.
        gap, failed = delivered.prove(members, lambda: left("proof"), known=version > 0 or not files)
        self._unproved = {r: failed[r.name] for r in members if r.name in failed}
        for reason in self._unproved.values():
            raise reason
        self._fleet.end_update(members, delivered)
        self._first = False
        return SyncReport(
            version=version,
            bytes=sent_bytes,
            replicas=len(members),
            backend=self._transport.backend,
            **left.spent(),
            proved=True,
            tensors_checked=len(sample),
            canary_nats=gap,
        )

    def _canary_sequences(self) -> list[TrainSequence]:
        return [TrainSequence(prompt_ids=tuple(p), response_ids=tuple(r)) for p, r in self._canary]

    def _all(self, asked: Sequence[Future[None]], timeout_s: float, what: str) -> None:
        all_of(dict(zip([r.name for r in self._members], asked, strict=True)), timeout_s, SyncError, what)

    def _connect(self, members: Sequence[Replica], timeout_s: float) -> None:
        self._connected = []
        actors = [replica.actor for replica in members]
        width = self._engine.tensor_parallel_size
        replicas = FanOut(actors, [replica.name for replica in members], width, timeout_s)
        meetings = [
            Meeting(
                rank=rank,
                address=self._learner.address,
                workers=len(actors) * width,
                dtypes=(self._learner.dtype, self._engine.dtype),
            )
            for rank in range(len(self._learner.actors))
        ]
        arguments = [(self._transport, meeting, replicas) for meeting in meetings]
        self._learner.scatter(LearnerRank.open_sync, arguments, timeout_s=timeout_s, turn="both")
        self._connected = actors


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
