"""Replicas without vLLM or Ray that answer one after the other, die, hang and lie when they are told to.

Pool, fleet, handout, push and controller are the real ones; only the processes are these.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import shared_gpu
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from onlinerl.protocols.engine import Place
from onlinerl.types import Group, Rollout

NODE = "ab" * 28

Fault = tuple[int, str, int]
"""Index of a replica, what it is asked for (`sample`, `answer` or a method), and which of these requests, counted over its restarts."""


class Ref:
    """What Ray would return for a call."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


class World(shared_gpu.World):
    """All processes, what goes wrong with them, and what happened."""

    def __init__(self, faults: dict[Fault, str] | None = None, room: int = 100) -> None:
        super().__init__(shared=False)
        self.faults = dict(faults or {})
        self.room = room
        """How many replicas there is room for."""
        self.calls: Counter[tuple[int, str]] = Counter()
        self.actors: list[Replica] = []
        self.asked: Counter[str] = Counter()
        """How often each prompt was given to a replica."""
        self.ended: list[int] = []
        """Processes that were ended for sure."""
        self.gate = threading.Event()
        """Replicas that are started again wait for it."""
        self.gate.set()
        self.before: Callable[[Replica, str], None] = lambda actor, method: None
        """Called before each call."""
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def later(self, future: Future[Any], work: Callable[[], Any]) -> None:
        self._work.put((future, work))

    def _answer(self) -> None:
        while True:
            future, work = self._work.get()
            time.sleep(0.0005)  # so that every replica has something in hand
            answer(future, work)

    def kill(self, actor: Any) -> None:
        if isinstance(actor, Replica):
            actor.die()


def answer(future: Future[Any], work: Callable[[], Any]) -> None:
    """Do what was asked for."""
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  the caller gets it, as from Ray
        result = RayTaskError("call", str(error), error)
    settle(future, result)


def settle(future: Future[Any], result: Any) -> None:
    """Answer a call, unless it has been answered."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


class Replica(shared_gpu.Replica):
    """An engine whose weights are one number."""

    world: World

    def __init__(self, world: World, index: int) -> None:
        self.number = len(world.actors)
        world.actors.append(self)
        self.alive, self.hung = True, False
        self.pending: list[Future[Any]] = []
        super().__init__(world, "replica", self.number)
        self.index = index
        self.call = SimpleNamespace(remote=lambda method, *args: self._ask(method, getattr(self, f"do_{method}"), *args))
        for name in ("place", "start", "processes", "generate", "logprobs"):
            setattr(self, name, self._method(name))

    def _method(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *args: self._ask(name, getattr(self, f"on_{name}"), *args))

    def _ask(self, method: str, work: Callable[..., Any], *args: Any) -> Ref:
        future: Future[Any] = Future()
        if method == "generate":
            self.world.asked[args[0].prompt.id] += 1
            method = "sample" if len(args[0].seeds) > 1 else "answer"
        self.world.before(self, method)
        self.world.calls[self.index, method] += 1
        fault = self.world.faults.get((self.index, method, self.world.calls[self.index, method]))
        self.pending.append(future)
        if fault == "kill" or not self.alive:
            self.die()
        elif fault == "hang" or self.hung:
            self.hung = True
        elif fault == "raise":
            self.world.later(future, lambda: 1 / 0)
        elif method == "start":  # which may wait
            threading.Thread(target=answer, args=(future, lambda: work(*args)), daemon=True).start()
        else:
            self.world.later(future, lambda: spoil(work(*args), fault) if fault else work(*args))
        return Ref(future)

    def die(self) -> None:
        self.alive = False
        for future in self.pending:
            settle(future, RayActorError())

    def on_place(self) -> Place:
        return Place(host="here", cores=(0,))

    def on_start(self, model: str, config: Any, settings: dict[str, Any], index: int, *places: Any) -> None:
        self.world.gate.wait(30)
        super().on_start(model, config, settings, index, *places)

    def on_processes(self) -> tuple[str, list[tuple[int, float]]]:
        return NODE, [(self.number, 0.0)]

    def on_generate(self, request: Any, sampling: Any) -> Group:
        rollouts = tuple(
            Rollout(
                token_ids=(3, 4 + seed % 90, 5),
                logprobs=(-1.0 - self.weights,) * 3,
                text=f" good {seed % 7}" * (seed % 3),
                finish_reason="stop",
                policy_version=int(self.version),
                sampler=how,
                seed=seed,
                source=source,
            )
            for seed, how, source in request.responses(sampling)
        )
        return Group(prompt=request.prompt, rollouts=rollouts)

    def do_process_ids(self) -> list[int]:
        return [self.number]

    def do_load_weights(self, path: str, version: int, dtypes: Any) -> None:
        """The base model's is 0."""
        file = Path(path) / "weights.json"
        self.weights = json.loads(file.read_text()) if file.exists() else 0.0
        self.version = str(version)


def spoil(right: Any, fault: str) -> Any:
    """An answer that cannot be true."""
    if fault == "other weights":  # of log-probs
        return [each - 1.0 for each in right]
    if fault == "other digests":
        return {name: "?" for name in right}
    if fault == "other version":
        return "77"
    group: Group = right
    if fault == "nothing finite":
        return replace(group, rollouts=(), rejected=("logprob",) * len(group.rollouts))
    first, *rest = group.rollouts
    changed = {
        "prompt": lambda: replace(group, prompt=replace(group.prompt, id="nobody")),
        "seed": lambda: replace(group, rollouts=(replace(first, seed=first.seed + 1), *rest)),
        "count": lambda: replace(group, rollouts=tuple(rest)),
        "version": lambda: replace(group, rollouts=(replace(first, policy_version=first.policy_version + 1), *rest)),
        "tokens": lambda: replace(group, rollouts=(replace(first, token_ids=(*first.token_ids, 7)), *rest)),
        "token": lambda: replace(group, rollouts=(replace(first, token_ids=(3, -4, 5)), *rest)),
        "nan": lambda: replace(group, rollouts=(replace(first, logprobs=(-1.0, float("nan"), -1.0)), *rest)),
    }
    return changed[fault]()


GARBAGE = ("prompt", "seed", "count", "version", "tokens", "token", "nan")


def install(monkeypatch: Any, world: World) -> None:
    """Let a run start its replicas and ranks in `world`."""
    from onlinerl.cluster import fleet, handout, replica, runtime
    from onlinerl.errors import ClusterError

    shared_gpu.install(monkeypatch, world, device="cpu")

    class Cluster(runtime.Cluster):  # the one that `shared_gpu` has put there
        def options(self, index: int, env: dict[str, str], **more: Any) -> dict[str, Any]:
            return {"env": env, "index": index}

        def reserve_like(self, index: int) -> str:
            if len([a for a in world.actors if a.alive]) >= world.room:
                raise ClusterError("one more needs a CPU", field="cluster", fix="add a node")
            return "room"

        def options_in(self, group: str, index: int, env: dict[str, str], **more: Any) -> dict[str, Any]:
            return {"env": env, "index": -1}

        def release(self, group: str) -> None: ...

    def options(**chosen: Any) -> SimpleNamespace:
        ranks = 1
        index = chosen["index"] - ranks if chosen["index"] >= 0 else len(world.actors)
        return SimpleNamespace(remote=lambda: Replica(world, index))

    def end(family: list[tuple[int, float]]) -> Ref:
        future: Future[Any] = Future()
        world.ended += [number for number, _ in family]
        future.set_result([])
        return Ref(future)

    def get(ref: Any, timeout: float | None = None) -> Any:
        if not wait_for([ref.future()], timeout=timeout).done:
            raise GetTimeoutError
        return ref.future().result()

    def wait(refs: Any, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        futures = {ref.future(): ref for ref in refs}
        if num_returns > 1:
            done = wait_for(futures, timeout=timeout).done
        else:
            done = set(list(wait_for(futures, timeout=timeout, return_when=FIRST_COMPLETED).done)[:1])
        return [futures[each] for each in done], [ref for future, ref in futures.items() if future not in done]

    monkeypatch.setattr(runtime, "Cluster", Cluster)
    monkeypatch.setattr(replica, "ReplicaActor", SimpleNamespace(options=options))
    monkeypatch.setattr(
        replica, "end_processes", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda family: end(family)))
    )
    monkeypatch.setattr(fleet, "PING_S", 2.0)
    monkeypatch.setattr(fleet, "LOOK_S", 0.01)
    monkeypatch.setattr(handout, "LOOK_S", 0.01)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "kill", world.kill)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeID": NODE}])
