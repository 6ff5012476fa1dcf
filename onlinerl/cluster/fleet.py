"""Which replicas there are, what they are doing, and what happens when one of them fails.

A replica that is lost is ended for sure, started again while there are restarts left (`engine.max_restarts`), given the current version
from the export on disk, because the learner may be busy, and serves once it has proved that it holds it. All of that happens in a
thread of its own; the others go on.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from onlinerl.cluster.delivery import Delivered
from onlinerl.cluster.replica import Replica, outcome
from onlinerl.cluster.starter import Starter
from onlinerl.cluster.states import ReplicaState
from onlinerl.controller.fleet import FleetReporter, Reason
from onlinerl.errors import EngineError, OnlineRLError
from onlinerl.protocols.engine import EngineConfig, EngineReplica
from onlinerl.types import Request, Sampling

RESTARTS = 3  # unless the configuration says another number
LOOK_S = 0.2  # how often whoever waits for a replica looks whether it can still come
PING_S = 30.0  # a replica that is asked nothing but its process ids answers within this, or is lost


class Closed(Exception):
    """The run is over."""


class Fleet:
    """The replicas of a run. Everything that changes a state does so here, one at a time.

    Args:
        config: the engine section.
        starter: starts replicas.
    """

    def __init__(self, config: EngineConfig, starter: Starter) -> None:
        self.replicas = [Replica(index) for index in range(config.replicas)]
        self.version: int | None = None
        """What the engine serves; None before the first push."""
        self.report: FleetReporter | None = None
        self.resized: Callable[[int], None] = lambda replicas: None
        """Told how many replicas there are to be from now on."""
        self.most = config.max_restarts if config.max_restarts is not None else RESTARTS
        self.heals = self.most > 0
        """Whether replicas that are lost are started again; otherwise the first one ends the run."""
        self._least, self._replicas, self._starter = config.min_replicas, config.replicas, starter
        self._delivered: Delivered | None = None
        self._changed = threading.Condition(threading.RLock())
        self._updating = self._closing = False
        self._starts_allowed = True  # not while a learner on the same GPUs has their memory
        self._losses = self._restarts = 0
        self._ending: set[int] = set()  # indices of those that were removed and whose room is not given back yet
        self._last: OnlineRLError | None = None
        self._failure: Exception | None = None

    # --- who is there ---

    def able(self) -> list[Replica]:
        """Those that may be given work: all that serve, or none while fewer than `engine.min_replicas` do.

        Raises:
            EngineError: if there is nothing to wait for.
        """
        with self._changed:
            self._require_open()
            self.require_enough()
            found = [r for r in self.replicas if r.state is ReplicaState.SERVING]
            if len(found) >= self._least:
                return found
            self._require_hope()
            return []

    def require_enough(self) -> None:
        """See that the fleet can go on, and let go of those that are leaving and have nothing in hand.

        Raises:
            EngineError: if fewer replicas are left than must be, and none of them comes back.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._let_go()
            left = [r for r in self.replicas if r.coming_back or r.state is not ReplicaState.DEAD]
            if len(left) < self._least:
                assert self._last is not None
                raise EngineError(
                    f"{len(left)} of {len(self.replicas)} replicas are left, at least {self._least} must be "
                    f"(engine.min_replicas), and all {self.most} restarts are used up; the last one lost: {self._last.cause}",
                    field="engine.max_restarts",
                    fix="see why they fail in the logs, then `onlinerl resume`, which begins with fresh replicas and as many "
                    "restarts again; engine.max_restarts allows more of them",
                )

    def _require_hope(self) -> None:
        """Refuse to wait for ever, where nobody is on the way.

        Raises:
            EngineError: with what each of them does instead.
        """
        on_the_way = (ReplicaState.STARTING, ReplicaState.UPDATING)
        if not any((r.coming_back and self._starts_allowed) or r.state in on_the_way for r in self.replicas):
            states = ", ".join(f"{r.name} is {r.state}" for r in self.replicas)
            raise EngineError(
                f"at least {self._least} replicas are needed, and {states}",
                field="engine.min_replicas",
                fix="`onlinerl resume` starts fresh replicas; engine.min_replicas must not be more than there are",
            )

    def give(self, replica: Replica, request: Request, sampling: Sampling) -> tuple[Any, Any] | None:
        """Ask a replica for a group, unless it does not serve any more. Returns its process and the future of the group."""
        with self._changed:
            if replica.state is not ReplicaState.SERVING:
                return None
            return replica.actor, replica.generate(request, sampling)

    def answered(self, replica: Replica, actor: Any) -> None:
        """One prompt less in the hands of that process."""
        with self._changed:
            if replica.actor is actor:
                replica.answered()
                self._let_go()

    # --- losing one, and getting it back ---

    def lost(self, replica: Replica, actor: Any, reason: Reason, error: OnlineRLError) -> None:
        """Give up a replica whose process `actor` has failed; nothing if that has happened already."""
        with self._changed:
            if self._closing or replica.actor is not actor or replica.state is ReplicaState.DEAD:
                return
            replica.to(ReplicaState.DEAD)
            self._recover(replica, reason, error)

    def _recover(self, replica: Replica, reason: Reason, error: OnlineRLError) -> None:
        self._losses, self._last = self._losses + 1, error
        replica.version, replica.coming_back = None, False
        if self.report is not None:
            self.report.lost(self._now, self._losses, replica.name, reason, error.cause)
        if not self.heals:
            self._failure = self._failure or error
        elif replica.leaving:
            self._let_go()
        elif self._restarts >= self.most:
            self._note(f"{replica.name} is not started again: engine.max_restarts={self.most} are used up")
            self._begin(self._end, replica)
        else:
            self._restarts += 1
            replica.coming_back = True
            if self.report is not None:
                self.report.restarted(self._now, self._restarts, self.most, replica.name, reason)
            self._begin(self._bring_back, replica)
        self._moved()

    def _bring_back(self, replica: Replica) -> None:
        replica.end()
        self._start(replica)

    def _start(self, replica: Replica) -> None:
        with self._changed:
            self._require_open()
            while not self._starts_allowed:
                self._changed.wait(LOOK_S)
                self._require_open()
            if replica.leaving:
                if replica.actor is None:
                    self._give_back(replica)
                return
            self._starter.open(replica)
            self._moved()
        actor = replica.actor
        self._starter.load(replica)
        with self._changed:
            self._require_open()
            replica.to(ReplicaState.STALE)
            self._moved()
        while (delivered := self._missing(replica, actor)) is not None:
            gap = self._starter.restore(replica, delivered)
            with self._changed:
                if replica.actor is not actor or replica.state is not ReplicaState.UPDATING:
                    return
                current = delivered.version == self.version and not self._updating
                replica.to(ReplicaState.SERVING if current else ReplicaState.STALE)
                replica.version = delivered.version
                if current and self.report is not None:
                    self.report.note(
                        f"{replica.name} serves again: version {delivered.version} from disk, proved by {len(delivered.digests)} "
                        f"checksums and a canary {gap:.4f} nats off"
                    )
                self._moved()

    def _missing(self, replica: Replica, actor: Any) -> Delivered | None:
        """What a replica that is up must still be given, once no push is under way; None if it needs nothing any more."""
        with self._changed:
            while replica.actor is actor and replica.state in (ReplicaState.STALE, ReplicaState.UPDATING):
                self._require_open()
                if replica.state is ReplicaState.STALE and self._delivered is not None and not self._updating:
                    replica.to(ReplicaState.UPDATING)
                    return self._delivered
                self._changed.wait(LOOK_S)  # for the push that is under way, or the first one
            if replica.actor is actor and replica.state is not ReplicaState.DEAD:
                replica.coming_back = False
                self._changed.notify_all()
            return None

    def _begin(self, work: Callable[[Replica], None], replica: Replica) -> None:
        actor = replica.actor

        def guarded() -> None:
            try:
                work(replica)
            except Closed:
                return
            except OnlineRLError as error:
                with self._changed:
                    if self._closing:
                        return
                    if replica.state is not ReplicaState.DEAD:
                        self.lost(replica, replica.actor, "start", error)
                    elif replica.actor is actor:  # it would not end
                        self._recover(replica, "start", error)
            except Exception as error:  # noqa: BLE001  (raised again in the thread of a phase)
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()

        threading.Thread(target=guarded, name=f"{work.__name__} {replica.name}", daemon=True).start()

    def _end(self, replica: Replica) -> None:
        try:
            replica.end()
        except EngineError as error:
            self._note(f"{error.cause}; {error.fix}")
            return
        if replica.leaving and replica.actor is not None:  # else `_start` sees it
            self._give_back(replica)

    # --- pushes ---

    def begin_update(self) -> list[Replica]:
        """Everybody who can take part in a push, once these are enough. Nobody serves until `end_update`.

        Raises:
            EngineError: if they cannot become enough.
        """
        with self._changed:
            while True:
                self._require_open()
                self.require_enough()
                members = [r for r in self.replicas if r.state in (ReplicaState.SERVING, ReplicaState.STALE)]
                if len(members) >= self._least:
                    break
                self._require_hope()
                self._changed.wait(LOOK_S)
            for replica in members:
                replica.to(ReplicaState.UPDATING)
            self._updating = True
            return members

    def end_update(self, members: Sequence[Replica], delivered: Delivered | None) -> None:
        """They have proved that they hold it; None if the push failed, and nobody knows what they hold."""
        with self._changed:
            self._updating = False
            if delivered is not None:
                self._delivered, self.version = delivered, delivered.version
            for replica in members:
                if replica.state is ReplicaState.UPDATING:
                    replica.to(ReplicaState.SERVING if delivered is not None else ReplicaState.STALE)
                    replica.version = None if delivered is None else delivered.version
            self._moved()

    def silent(self, replicas: Sequence[Replica]) -> dict[Replica, OnlineRLError]:
        """Which of these do not answer at all, and what is wrong with them. All of the engine behind a replica has to answer."""
        asked = {r: r.call(EngineReplica.process_ids) for r in replicas}
        answers = {r: _within(future, r.name, PING_S) for r, future in asked.items()}
        return {r: answer for r, answer in answers.items() if isinstance(answer, OnlineRLError)}

    def doubt(self, replica: Replica) -> OnlineRLError | None:
        """What is wrong with a replica whose answer makes no sense; None if it still computes with the right weights."""
        assert self._delivered is not None
        answer = _within(replica.logprobs(self._delivered.canary), replica.name, PING_S)
        if isinstance(answer, OnlineRLError):
            return answer
        try:
            self._delivered.check_canary(replica.name, answer)
        except OnlineRLError as error:
            return error
        return None

    # --- from one run to the next ---

    @property
    def intact(self) -> bool:
        """Whether it is what was started: no replica was lost, and there are not more or fewer by now."""
        with self._changed:
            return not self._losses and [r.index for r in self.replicas] == list(range(self._replicas))

    def begin_run(self) -> None:
        """Another run begins: nobody serves before its first push has proved what they hold, and no version of the last run counts."""
        self.end_update(self.begin_update(), None)
        with self._changed:
            self._delivered = self.version = None

    # --- memory that is shared with a learner ---

    def move(self, state: ReplicaState) -> list[Replica]:
        """All that are up go to sleep, or wake up: as stale before a push, serving without one. Returns them; ask them afterwards."""
        with self._changed:
            self.require_enough()
            moved = [r for r in self.replicas if r.state is not ReplicaState.DEAD]
            for replica in moved:
                # Without a push, they serve what they held before, if they did.
                unproved = state is ReplicaState.SERVING and (self.version is None or replica.version != self.version)
                replica.to(ReplicaState.STALE if unproved else state)
            self._moved()
            return moved

    def settle(self, timeout_s: float) -> None:
        """Nobody starts from here on, until `allow_starts`. Returns once those that were starting are up, and nothing is left of the lost.

        Raises:
            EngineError: if that is not so within the time: their memory is about to be another's.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._starts_allowed = False
            while left := [r for r in self.replicas if self._unsettled(r)]:
                self._require_open()
                self.require_enough()
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"after {timeout_s:.0f} s, {' and '.join(f'{r.name} ({r.state})' for r in left)} cannot give up its GPU",
                        field="cluster.colocate",
                        fix="see why in the logs; then `onlinerl resume`, which begins with fresh replicas",
                    )
                self._changed.wait(LOOK_S)

    def _unsettled(self, replica: Replica) -> bool:
        waits_for_a_push = replica.state is ReplicaState.STALE and self._delivered is None
        dead = replica.state is ReplicaState.DEAD
        return not replica.ended if dead else replica.coming_back and not waits_for_a_push

    def allow_starts(self) -> None:
        """The GPUs' memory is the replicas' again: those that were lost meanwhile come back."""
        with self._changed:
            self._starts_allowed = True
            self._changed.notify_all()

    # --- more and fewer ---

    def resize(self, wanted: int) -> None:
        """Have this many replicas. New ones come when they are up; those that go finish what they have in hand."""
        with self._changed:
            staying = [r for r in self.replicas if not r.leaving and (r.coming_back or r.state is not ReplicaState.DEAD)]
            if wanted < self._least:
                self._note(f"not scaled to {wanted} replicas: engine.min_replicas is {self._least}")
                return
            # Those that do not serve go first, then the last ones.
            staying.sort(key=lambda r: (r.state is not ReplicaState.SERVING, r.index))
            for replica in staying[wanted:]:
                replica.leaving = True
            for _ in range(wanted - len(staying)):
                self._add()
            if wanted < len(staying):
                self._note(f"scaling from {len(staying)} to {wanted} replicas")
                self.resized(wanted)
            self._let_go()

    def _add(self) -> None:
        for gone in [r for r in self.replicas if r.state is ReplicaState.DEAD and r.ended and not r.coming_back]:
            self.replicas = [r for r in self.replicas if r is not gone]  # for good: its place is free
            self._starter.release(gone.index)
        taken = {r.index for r in self.replicas} | self._ending
        replica = Replica(min({*range(len(taken) + 1)} - taken))
        replica.coming_back = True
        self.replicas = [*self.replicas, replica]
        self._begin(self._join, replica)

    def _join(self, replica: Replica) -> None:
        try:
            self._starter.reserve(replica.index)
        except OnlineRLError as error:
            with self._changed:
                self.replicas = [r for r in self.replicas if r is not replica]
                self._ending.discard(replica.index)
                self._note(f"no room for {replica.name}: {error.cause}; the run goes on with {len(self.replicas)}")
                self._moved()
            return
        with self._changed:
            if not replica.leaving:  # since it waits for room
                there = sum(not r.leaving for r in self.replicas)
                self._note(f"{replica.name} is started: {there} replicas from now on")
                self.resized(there)
        self._start(replica)

    def _let_go(self) -> None:
        for replica in [r for r in self.replicas if r.leaving]:
            if replica.state is ReplicaState.SERVING:
                replica.to(ReplicaState.PAUSED)
            idle = replica.state is ReplicaState.PAUSED and not replica.in_hand
            if idle or replica.state is ReplicaState.STALE:
                replica.to(ReplicaState.DEAD)
            if replica.state is ReplicaState.DEAD:
                self.replicas = [r for r in self.replicas if r is not replica]
                self._ending.add(replica.index)
                self._note(f"{replica.name} is removed")
                self._begin(self._end, replica)
                self._moved()

    def _give_back(self, replica: Replica) -> None:
        self._starter.release(replica.index)
        self._ending.discard(replica.index)  # only now may another one have it

    # --- the end ---

    def close(self) -> list[Replica]:
        """Nothing is started any more. Returns the replicas that have a process."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            return [r for r in self.replicas if r.actor is not None]

    def _require_open(self) -> None:
        if self._closing:
            raise Closed

    @property
    def _now(self) -> int:
        return self.version or 0

    def _note(self, text: str) -> None:
        if self.report is not None:
            self.report.note(text)

    def _moved(self) -> None:
        self._changed.notify_all()
        if self.report is not None:
            counts = {state.value: 0 for state in ReplicaState} | Counter(r.state.value for r in self.replicas)
            self.report.states(self._now, counts, self._least)


def _within(future: Future[Any], name: str, timeout_s: float) -> Any:
    wait([future], timeout=timeout_s)
    return outcome(future, name, timeout_s, EngineError, "answering")
