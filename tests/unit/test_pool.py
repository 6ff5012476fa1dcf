"""The pull queue, without Ray: who gets work, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from onlinerl.types import Prompt, Request, Sampling

pool_module = pytest.importorskip("onlinerl.cluster.pool")


class Replica:
    """Hands out a reference per prompt."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.generate = SimpleNamespace(remote=self._remote)

    def _remote(self, request: Request, sampling: Sampling) -> tuple[int, str]:
        self.given.append(request.prompt.id)
        return id(self), request.prompt.id


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_every_replica_is_kept_full_and_nothing_is_lost(monkeypatch, replicas):
    """R-I1: each has as many prompts as it has room for, plus one at its door, while there are any left."""
    pool = pool_module.EnginePool.__new__(pool_module.EnginePool)
    pool.actors = [Replica() for _ in range(replicas)]
    pool.names = [f"replica {i}" for i in range(replicas)]
    pool._config = SimpleNamespace(max_concurrent=16, generate_timeout_s=1.0)
    pool._turns = SimpleNamespace(need=lambda turn: None)
    at_work: list[int] = []

    def wait(refs, num_returns, timeout):
        at_work.append(len(refs))
        return [refs[len(refs) // 2]], []

    monkeypatch.setattr(pool_module.ray, "wait", wait)
    monkeypatch.setattr(pool_module, "get", lambda refs, **_: [ref[1] for ref in refs.values()])
    requests = [Request(prompt=Prompt(id=str(i), text="", token_ids=(1,)), seeds=(1, 2, 3, 4)) for i in range(40)]

    finished = list(pool.generate(requests, Sampling()))

    assert sorted(finished, key=int) == [str(i) for i in range(40)]
    room = replicas * (16 // 4 + 1)
    assert at_work[: 40 - room + 1] == [room] * (40 - room + 1)
    assert sum(len(replica.given) for replica in pool.actors) == 40
