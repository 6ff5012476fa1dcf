"""Replicas and learner ranks without vLLM, DeepSpeed or Ray, on GPUs that can run out of memory.

The classes of `onlinerl.cluster` are the real ones; only the actors behind them are these. Each records what it is asked for and does
only what real parts could do then: an engine without a KV cache cannot generate, a sleeping one cannot receive weights, a learner
without its optimizer cannot step, and what does not fit into a GPU's memory raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from onlinerl.learners._self_test import Sums
from onlinerl.protocols.engine import Place
from onlinerl.protocols.learner import RankSettings
from onlinerl.types import Group, Rollout

CAPACITY = 8.5
SIZES = {"engine weights": 2.0, "kv cache": 5.0, "policy": 2.0, "optimizer": 6.0}
"""Either side fits alone, but not with all of the other; during a push, the weights of both fit."""
BROKEN = "broken"


class Gpu:
    """Memory of one GPU."""

    def __init__(self) -> None:
        self.held: set[str] = set()

    def take(self, *parts: str) -> None:
        """Allocate."""
        self.held |= set(parts)
        if sum(SIZES[p] for p in self.held) > CAPACITY:
            raise MemoryError(f"CUDA out of memory: {sorted(self.held)}")

    def give(self, *parts: str) -> None:
        """Free."""
        self.held -= set(parts)

    def need(self, *parts: str) -> None:
        """Touch."""
        if missing := set(parts) - self.held:
            raise RuntimeError(f"CUDA error: an illegal memory access: {sorted(missing)}")


class World:
    """All GPUs and processes of a cluster, and what happened on each."""

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        self.events: dict[str, list[str]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.fail: Callable[[str, str], bool] = lambda who, what: False
        self.dies: Callable[[str, str], bool] = lambda who, what: False
        self._gpus: dict[str, Gpu] = {}

    def gpu(self, role: str, index: int) -> Gpu:
        """The GPU of a process: that of its neighbour of the other role, if they share."""
        return self._gpus.setdefault(f"gpu {index}" if self.shared else f"{role} {index}", Gpu())

    def happened(self, index: int, what: str) -> None:
        """Record on GPU `index`; the same thing again and again is one event."""
        events = self.events.setdefault(f"gpu {index}", [])
        if not events or events[-1] != what:
            events.append(what)
        if self.fail(f"gpu {index}", what):
            raise RuntimeError(BROKEN)


class Ref:
    """What Ray would return for a call; the work is done at once."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.error: Exception | None = None  # RayActorError where there is no process
        self.result: Any = None
        try:
            self.result = work()
        except Exception as error:  # noqa: BLE001  the caller gets it, as from Ray
            self.error = error

    def future(self) -> Future[Any]:
        """The same, as `concurrent.futures` has it."""
        done: Future[Any] = Future()
        if self.error is not None:
            done.set_exception(self.said)
        else:
            done.set_result(self.result)
        return done

    @property
    def said(self) -> Exception:
        """The error as Ray hands it on."""
        assert self.error is not None
        return self.error if isinstance(self.error, RayActorError) else RayTaskError("call", str(self.error), self.error)


def remote(method: Callable[..., Any]) -> SimpleNamespace:
    """`method.remote(...)`."""
    return SimpleNamespace(remote=lambda *args: Ref(lambda: method(*args)))


class Actor:
    """Answers `call.remote(method, ...)` with its own methods."""

    PARTS: tuple[str, ...]

    def __init__(self, world: World, role: str, index: int) -> None:
        self.world, self.index, self.gpu = world, index, world.gpu(role, index)
        self.dead = False
        self.call = remote(lambda method, *args: self._living(f"do_{method}")(*args))
        for name in ("place", "start", "processes", "host", "free_port", "generate", "logprobs"):
            if hasattr(self, f"on_{name}"):
                setattr(self, name, remote(lambda *args, name=name: self._living(f"on_{name}")(*args)))

    def _living(self, method: str) -> Any:
        if self.dead:
            raise RayActorError
        return getattr(self, method)

    def did(self, what: str) -> None:
        self.world.happened(self.index, what)
        if self.world.dies(f"gpu {self.index}", what):
            self.end()
            raise RayActorError

    def end(self) -> None:
        """The process is gone, and what it had on its GPU."""
        self.dead = True
        self.gpu.give(*self.PARTS)

    def do_shutdown(self) -> None: ...


class Replica(Actor):
    """An engine whose weights are one number."""

    PARTS = ("engine weights", "kv cache")

    def on_place(self) -> Place:
        return Place(host="here", cores=(0,))

    def on_start(self, model: str, config: Any, settings: dict[str, Any], index: int, *places: Ref) -> None:
        self.did("engine loads")
        self.gpu.take("engine weights", "kv cache")
        self.weights, self.version, self.incoming = 0.0, "none", 0.0

    def on_processes(self) -> tuple[str, list[tuple[int, float]]]:
        return "node", []

    def do_process_ids(self) -> list[int]:
        return []

    def do_load_weights(self, path: str, version: int, dtypes: Any) -> None:
        self.did("engine loads a version")
        self.gpu.need("engine weights")
        saved = Path(path) / "weights.json"
        self.weights, self.version = json.loads(saved.read_text()) if saved.exists() else 0.0, str(version)

    def _ready(self) -> None:
        self.gpu.need("engine weights", "kv cache")

    def on_generate(self, request: Any, sampling: Any) -> Group:
        self.did("engine generates")
        self._ready()
        rollouts = []
        for i, seed in enumerate(request.seeds):
            tokens = (3, 4 + i, 5)
            rollouts.append(
                Rollout(
                    token_ids=tokens,
                    logprobs=(-1.0 - self.weights,) * len(tokens),
                    text=" good" * i + " film" * (1 + len(request.prompt.id)),
                    finish_reason="stop",
                    policy_version=int(self.version),
                    sampler=sampling,
                    seed=seed,
                )
            )
        return Group(prompt=request.prompt, rollouts=tuple(rollouts))

    def on_logprobs(self, pairs: Any) -> list[np.ndarray]:
        self.did("engine gives log-probs")
        self._ready()
        return [np.full(len(response), -1.0 - self.weights, np.float32) for _, response in pairs]

    def do_sleep(self) -> None:
        self.did("engine sleeps")
        self.gpu.give("engine weights", "kv cache")

    def do_wake_up(self, tags: list[str] | None) -> None:
        self.did(f"engine wakes: {'all' if tags is None else tags[0]}")
        parts = {"weights": "engine weights", "kv_cache": "kv cache"}
        self.gpu.take(*(parts[tag] for tag in tags or parts))

    def do_init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.gpu.need("engine weights")

    def do_watch(self, names: list[str]) -> None:
        self.names = names

    def do_start_weight_update(self) -> None:
        self.gpu.need("engine weights")

    def do_update_weights(self, info: dict[str, float]) -> None:
        self.did("engine receives")
        self.gpu.need("engine weights")
        self.weights = info["value"]

    def do_finish_weight_update(self, version: str) -> None:
        self.gpu.need("engine weights")
        self.version = version

    def do_reset_caches(self) -> None:
        self._ready()

    def do_weight_version(self) -> str:
        return self.version

    def do_received(self) -> dict[str, str]:
        return {name: str(self.weights) for name in self.names}


class Rank(Actor):
    """A learner whose weights are one number, which every step raises."""

    PARTS = ("policy", "optimizer")

    def on_host(self, timeout_s: float) -> tuple[str, int]:
        return "127.0.0.1", 1

    def on_start(self, address: str, port: int, rank: int, config: Any, settings: RankSettings) -> None:
        self.did("learner loads")
        self.gpu.take("policy", "optimizer")
        self.rank, self.ranks, self.weights = rank, settings.world_size, 0.0

    def _work(self, what: str) -> None:
        self.did(f"learner {what}")
        self.gpu.need("policy", "optimizer")

    def _of(self, model: str) -> float:
        saved = Path(model) / "weights.json"
        return self.weights if model == "policy" else json.loads(saved.read_text()) if saved.exists() else 0.0

    def do_logprobs(self, micro: Any, model: str, temperature: float) -> Any:
        self._work("gives log-probs")
        return [[np.full(len(s.response_ids), -1.0 - self._of(model), np.float32) for s in one] for one in micro]

    def do_self_test(self, micro: Any, base_model: str) -> list[Sums]:
        """As if every rank had as many pairs as this one."""
        self._work("tests itself")
        loss = float(np.log(2)) * sum(map(len, micro))
        return [Sums(loss=loss, stored_loss=loss, tokens=1)] * self.ranks

    def do_step(self, micro: Any, count: int, learning_rate: float) -> dict[str, float]:
        self._work("steps")
        self.weights += 1e-4
        return {"loss": 0.5, "grad_norm": 1.0, "learning_rate": learning_rate, "skipped": 0.0}

    def do_save(self, path: str) -> dict[str, int]:
        self._work("saves")
        names = ["weights.json", "rank_0.json"] if self.rank == 0 else [f"rank_{self.rank}.json"]
        return {name: (Path(path) / name).write_text(json.dumps(self.weights)) for name in names}

    def do_load(self, path: str) -> None:
        self._work("restores")
        self.weights = json.loads((Path(path) / "weights.json").read_text())

    def do_export(self, path: str, tokenizer: str) -> None:
        self._work("exports")
        if self.rank == 0:
            (Path(path) / "weights.json").write_text(json.dumps(self.weights))

    def do_offload(self, what: str) -> None:
        self.did(f"learner leaves: {what}")
        self.gpu.give("optimizer", *(["policy"] if what == "all" else []))

    def do_reload(self) -> None:
        self.did("learner returns")
        self.gpu.take("policy", "optimizer")

    def do_open_sync(self, transport: Any, meeting: Any, client: Any) -> None:
        self.gpu.need("policy")
        self.client = client
        if self.rank == 0 and transport.receiver is not None:
            client.init_weight_transfer_engine({"packed": True})

    def do_parameter_names(self) -> list[str]:
        return ["a", "b"]

    def do_wire_bytes(self) -> int:
        return 8

    def do_digests(self, names: list[str], model: str) -> dict[str, str]:
        self.gpu.need("policy")
        return {name: str(self._of(model)) for name in names}

    def do_send_weights(self, version: int, path: str | None, model: str) -> None:
        self.gpu.need("policy")
        if self.rank == 0 and path is not None:
            self.client.load_weights(path, version, ("float32", "float32"))
        elif self.rank == 0:
            self.client.version = version
            self.client.start_weight_update()
            self.client.update_weights({"value": self._of(model)})
            self.client.finish_weight_update()


def install(monkeypatch: Any, world: World, *, device: str) -> None:
    """Let a run start its replicas and ranks in `world`."""
    from onlinerl.cluster import group, replica, runtime

    def actors(role: str, make: type[Actor]) -> SimpleNamespace:
        def options(**chosen: Any) -> SimpleNamespace:
            index = chosen["index"] if role == "rank" else chosen["index"] - chosen["ranks"]
            world.environments[f"{role} {index}"] = chosen["env"]
            return SimpleNamespace(remote=lambda: make(world, role, index))

        return SimpleNamespace(options=options)

    class Cluster:
        def __init__(self, config: Any) -> None:
            self.device, self.logs, self.ranks = device, "/tmp/ray/session/logs", config.learner.ranks

        def share_cores(self) -> bool:
            return False

        def __enter__(self) -> Cluster:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def options(self, index: int, env: dict[str, str], **more: Any) -> dict[str, Any]:
            return {"env": env, "index": index, "ranks": self.ranks}

    def get(ref: Ref, timeout: float | None = None) -> Any:
        if ref.error is not None:
            raise ref.said
        return ref.result

    def wait(refs: Any, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
        return list(refs)[:num_returns], list(refs)[num_returns:]

    monkeypatch.setattr(runtime, "Cluster", Cluster)
    monkeypatch.setattr(replica, "ReplicaActor", actors("replica", Replica))
    monkeypatch.setattr(group, "RankActor", actors("rank", Rank))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "kill", lambda actor: actor.end())
    monkeypatch.setattr(ray, "cancel", lambda ref, force: None)
