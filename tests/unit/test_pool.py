"""Who gets work, and when."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from onlinerl.types import Group, Prompt, Request, Rollout, Sampling

handout = pytest.importorskip("onlinerl.cluster.handout")
fleet_module = pytest.importorskip("onlinerl.cluster.fleet")


class Actor:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.given: list[tuple[Request, Future]] = []
        self.generate = SimpleNamespace(remote=self._remote)

    def _remote(self, request: Request, sampling: Sampling) -> SimpleNamespace:
        future: Future = Future()
        self.given.append((request, future))
        return SimpleNamespace(future=lambda: future)

    def answer(self) -> None:
        request, future = self.given.pop(0)
        rollouts = tuple(
            Rollout(
                token_ids=(1,), logprobs=(-1.0,), text="", finish_reason="stop", policy_version=0, sampler=Sampling(), seed=s
            )
            for s in request.seeds
        )
        future.set_result(Group(prompt=request.prompt, rollouts=rollouts))


def handed_out(replicas: int, prompts: int):
    """So many prompts of four responses each, and replicas that take sixteen responses at a time."""
    config = SimpleNamespace(replicas=replicas, max_num_seqs=16, generate_timeout_s=60.0, max_restarts=3, min_replicas=1)
    fleet = fleet_module.Fleet(config, SimpleNamespace())
    fleet.version = 0
    for replica in fleet.replicas:
        replica.actor, replica.state = Actor(), fleet_module.ReplicaState.SERVING
    requests = [Request(prompt=Prompt(id=str(i), text="", token_ids=(1,)), seeds=(1, 2, 3, 4)) for i in range(prompts)]
    return fleet, handout.Handout(fleet, requests, Sampling(), config)


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_every_replica_is_kept_full_and_nothing_is_lost(replicas):
    """Each has as many prompts as it has room for, plus one at its door, while there are any left."""
    fleet, started = handed_out(replicas, 40)
    room = replicas * (16 // 4 + 1)

    at_work = []
    # Whoever has most answers first, each time somebody waits.
    original = handout.queue.SimpleQueue.get

    class Queue(handout.queue.SimpleQueue):
        def get(self, timeout):
            at_work.append(sum(len(r.actor.given) for r in fleet.replicas))
            max(fleet.replicas, key=lambda r: len(r.actor.given)).actor.answer()
            return original(self, timeout=timeout)

    started._finished = Queue()
    finished = [group.prompt.id for groups in started.groups() for group in groups]

    assert sorted(finished, key=int) == [str(i) for i in range(40)]
    assert at_work[: 40 - room + 1] == [room] * (40 - room + 1)


def test_what_has_finished_meanwhile_comes_together_and_before_what_fails():
    fleet, started = handed_out(1, 6)
    actor, original = fleet.replicas[0].actor, handout.queue.SimpleQueue.get
    moments = iter([3, 2])

    class Queue(handout.queue.SimpleQueue):
        def get(self, timeout):
            answers = next(moments)
            for _ in range(answers):
                actor.answer()
            if answers == 2:
                actor.given[0][1].set_exception(RuntimeError("planted"))
            return original(self, timeout=timeout)

    started._finished = Queue()
    groups = started.groups()
    assert [group.prompt.id for group in next(groups)] == ["0", "1", "2"]
    assert [group.prompt.id for group in next(groups)] == ["3", "4"], "written before the error ends the run"
    with pytest.raises(RuntimeError, match="planted"):
        next(groups)
