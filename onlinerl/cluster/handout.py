"""One pull queue of prompts for all replicas: no replica idles while another has a backlog, and no prompt is lost with a replica."""

from __future__ import annotations

import math
import queue
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from onlinerl.cluster.fleet import LOOK_S, Fleet
from onlinerl.cluster.replica import Replica, outcome
from onlinerl.controller.fleet import Reason
from onlinerl.errors import EngineError, OnlineRLError
from onlinerl.protocols.engine import EngineConfig
from onlinerl.types import Group, Request, Sampling

TRIES = 2
"""How often a prompt is asked that a replica fails on which is well otherwise; then it is the prompt."""


@dataclass(eq=False)
class _Hand:
    """What one process has in hand."""

    replica: Replica
    actor: Any
    waiting: dict[Future[Group], Request] = field(default_factory=dict)


class Handout:
    """The requests of one call, until all of them are answered.

    Args:
        fleet: who answers.
        requests: each keeps its seeds, whoever answers it, however often it is asked.
        sampling: of all of them.
        config: the engine section.
    """

    def __init__(self, fleet: Fleet, requests: Sequence[Request], sampling: Sampling, config: EngineConfig) -> None:
        self._fleet, self._sampling, self._timeout_s = fleet, sampling, config.generate_timeout_s
        self._queue = deque(requests)
        self._hands: dict[int, _Hand] = {}
        self._finished: queue.SimpleQueue[tuple[_Hand, Future[Group]]] = queue.SimpleQueue()
        self._failures: Counter[str] = Counter()
        # Enough to keep every slot of a replica busy, plus one prompt that waits at its door.
        self._limit = 1 + -(-config.max_num_seqs // max(1, len(requests[0].seeds))) if requests else 0
        self._version = fleet.version
        self._looked = time.monotonic()

    def groups(self) -> Iterator[list[Group]]:
        """Groups as they finish, those together that have finished meanwhile.

        Raises:
            EngineError: if too few replicas are left, or a prompt cannot be answered.
        """
        try:
            while self._queue or any(hand.waiting for hand in self._hands.values()):
                self._hand_out()
                self._look_for_silence()
                groups: list[Group] = []
                try:
                    for hand, future in self._arrived():
                        if (group := self._taken(hand, future)) is not None:
                            groups.append(group)
                finally:  # what has arrived before one that ends the run is kept
                    if groups:
                        yield groups
        finally:
            for hand in self._hands.values():  # the caller gave up: do not leave work behind
                for future in hand.waiting:
                    _cancel(future)

    def _hand_out(self) -> None:
        able = self._fleet.able()  # also notices that there is nobody to wait for
        while self._queue and able:
            replica = min(able, key=self._load)
            if self._load(replica) >= self._limit:
                return
            given = self._fleet.give(replica, self._queue[0], self._sampling)
            if given is None:
                able.remove(replica)
                continue
            actor, future = given
            request = self._queue.popleft()
            hand = self._hands.get(replica.index)
            if hand is None or hand.actor is not actor:
                if hand is not None:  # it has been started again since
                    self._take_back(hand)
                hand = self._hands[replica.index] = _Hand(replica, actor)
            hand.waiting[future] = request
            future.add_done_callback(lambda done, hand=hand: self._finished.put((hand, done)))

    def _arrived(self) -> Iterator[tuple[_Hand, Future[Group]]]:
        """What has finished, after a short wait for the first."""
        with suppress(queue.Empty):
            yield self._finished.get(timeout=LOOK_S)
            while True:
                yield self._finished.get_nowait()

    def _taken(self, hand: _Hand, future: Future[Group]) -> Group | None:
        """The group, or None if it is of no use."""
        request = hand.waiting.pop(future, None)
        if request is None:  # its replica was given up, and somebody else is asked
            return None
        self._fleet.answered(hand.replica, hand.actor)
        return self._answer(hand, request, future)

    def _load(self, replica: Replica) -> int:
        hand = self._hands.get(replica.index)
        return len(hand.waiting) if hand is not None and hand.actor is replica.actor else 0

    def _answer(self, hand: _Hand, request: Request, future: Future[Group]) -> Group | None:
        """The group, or None if it has to be asked for again."""
        answer = outcome(future, hand.replica.name, 0.0, EngineError, "generating")
        if isinstance(answer, OnlineRLError):
            self._failed(hand, request, answer)
            return None
        wrong = _wrong(answer, request, self._sampling, self._version)
        if wrong is None and not answer.rollouts and set(answer.rejected) == {"logprob"}:
            # Not one finite number: the replica has gone bad, or the model has, and then every replica says the same.
            doubt = self._fleet.doubt(hand.replica) if self._fleet.heals else None
            wrong = None if doubt is None else doubt.cause
        if wrong is None:
            return answer
        self._queue.appendleft(request)
        error = EngineError(
            f"{hand.replica.name} answered prompt {request.prompt.id} with something that cannot be true: {wrong}",
            field="engine",
            fix="look at that replica's log; `onlinerl resume` starts fresh replicas",
        )
        self._give_up(hand, "garbage", error)
        return None

    def _failed(self, hand: _Hand, request: Request, error: OnlineRLError) -> None:
        self._queue.appendleft(request)
        replica = hand.replica
        if not self._fleet.heals or replica.actor is not hand.actor or replica in self._fleet.silent([replica]):
            self._give_up(hand, "died", error)
            return
        # It still answers: perhaps nobody can do what it was asked.
        self._failures[request.prompt.id] += 1
        if self._failures[request.prompt.id] >= TRIES:
            raise type(error)(error.cause, field=error.field or "engine", fix=error.fix)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        for hand in list(self._hands.values()):
            if hand.replica.actor is not hand.actor:
                self._take_back(hand)
                continue
            # What it has said already may still wait here, if whoever takes the groups is slow.
            silent = bool(hand.waiting) and not any(future.done() for future in hand.waiting)
            if silent and now - hand.replica.progress > self._timeout_s:
                error = EngineError(
                    f"no response from {hand.replica.name} for {self._timeout_s:.0f} s",
                    field="engine.generate_timeout_s",
                    fix="look at that replica; raise the limit if single responses really take that long",
                )
                self._give_up(hand, "hung", error)

    def _give_up(self, hand: _Hand, reason: Reason, error: OnlineRLError) -> None:
        self._fleet.lost(hand.replica, hand.actor, reason, error)
        self._take_back(hand)

    def _take_back(self, hand: _Hand) -> None:
        """Everything that it has in hand goes to somebody else; what it still says about it is not listened to."""
        self._queue.extendleft(reversed(hand.waiting.values()))
        hand.waiting.clear()
        if self._hands.get(hand.replica.index) is hand:
            del self._hands[hand.replica.index]


def _wrong(group: Group, request: Request, sampling: Sampling, version: int | None) -> str | None:
    """What cannot be true about an answer; None if it may be."""
    if group.prompt.id != request.prompt.id:
        return f"it belongs to prompt {group.prompt.id}"
    seeds = [rollout.seed for rollout in group.rollouts]
    if len(seeds) + len(group.rejected) != len(request.seeds) or not _in_order(seeds, request.seeds):
        return f"{len(seeds)} responses and {len(group.rejected)} rejected ones for {len(request.seeds)} seeds, or other seeds"
    for rollout in group.rollouts:
        if version is not None and rollout.policy_version != version:
            return f"a response of version {rollout.policy_version}, and the engine serves {version}"
        tokens, logprobs = rollout.token_ids, rollout.logprobs
        most = sampling.max_new_tokens - len(request.prefix_ids)
        if not 0 < len(tokens) == len(logprobs) <= most:
            return f"{len(tokens)} tokens with {len(logprobs)} log-probs, of at most {most}"
        if tuple(rollout.prefix_ids) != request.prefix_ids:
            return f"a response that begins with {len(rollout.prefix_ids)} other tokens than the {len(request.prefix_ids)} that it should"
        if min(tokens) < 0:
            return f"the token {min(tokens)}"
        if not all(map(math.isfinite, logprobs)):
            return "a log-prob that is not finite"
    return None


def _in_order(some: Sequence[int], of: Sequence[int]) -> bool:
    left = iter(of)
    return all(seed in left for seed in some)


def _cancel(future: Future[Group]) -> None:
    ref = getattr(future, "object_ref", None)
    if ref is not None:
        ray.cancel(ref, force=False)
