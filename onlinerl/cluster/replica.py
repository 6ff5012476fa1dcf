"""One replica: its process, its state, and how it is ended for sure."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import psutil
import ray
from ray.exceptions import RayError

from onlinerl.cluster import states
from onlinerl.cluster.runtime import explained
from onlinerl.cluster.states import ReplicaState
from onlinerl.engines import _fit
from onlinerl.errors import EngineError, OnlineRLError
from onlinerl.protocols.engine import EngineConfig, EngineReplica, Place, ReplicaSettings
from onlinerl.types import Group, Request, Sampling

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
TokenPair = tuple[Sequence[int], Sequence[int]]
END_S = 60.0
"""Longest wait for processes to be gone that were killed."""


async def loaded(
    model: str, config: EngineConfig, settings: ReplicaSettings, index: int, places: Sequence[Place]
) -> EngineReplica:
    """Replica `index` of those at `places`, with its model.

    Raises:
        OnlineRLError: whatever went wrong. An engine's own error may not survive the way to the controller: pydantic's cannot be
            pickled, others cannot be unpickled.
    """
    try:
        return await config.replica(model, places, index, settings)
    except OnlineRLError:
        raise
    except Exception as error:  # an engine may raise anything
        traceback.print_exc()  # into this process's log: only the message travels
        raise EngineError(
            f"starting the engine failed: {type(error).__name__}: {error}", fix="see the traceback in the Ray logs"
        ) from error


@ray.remote
class ReplicaActor:
    """A replica in a process of its own."""

    async def place(self) -> Place:
        """Where Ray has put it."""
        return _fit.this_place()

    async def start(self, model: str, config: EngineConfig, settings: ReplicaSettings, index: int, *places: Place) -> None:
        """Load the model; takes tens of seconds. Replica `index` of those at `places`."""
        self._replica: EngineReplica = await loaded(model, config, settings, index, places)

    async def processes(self) -> tuple[str, list[tuple[int, float]]]:
        """The node that it lives on; its process there and all those below it, each with the time at which it began."""
        own = psutil.Process()
        family = [(each.pid, each.create_time()) for each in (own, *own.children(recursive=True))]
        return ray.get_runtime_context().get_node_id(), family

    async def call(self, method: str, *args: Any) -> Any:
        """A method of the replica, by its name in `EngineReplica`; `Replica.call` is how it is asked for."""
        return await getattr(self._replica, method)(*args)

    async def generate(self, request: Request, sampling: Sampling) -> Group:
        """All responses to one prompt."""
        group: Group = await self._replica.generate(request, sampling)
        return group

    async def logprobs(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        """Teacher-forced log-probs."""
        return [await self._replica.logprobs(prompt, response) for prompt, response in pairs]


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def end_processes(family: Sequence[tuple[int, float]]) -> list[int]:
    """Kill these processes of this machine, stopped ones too, and wait until they are gone. Returns those that would not go."""
    found = []
    for pid, began in family:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == began and pid != os.getpid():  # the number may be another process's by now
                process.kill()
                found.append(process)
    _, alive = psutil.wait_procs(found, timeout=END_S / 2)
    return [p.pid for p in alive if p.status() != psutil.STATUS_ZOMBIE]


class Replica:
    """A place in the fleet, and the process that fills it at the moment.

    Args:
        index: which it is; its name is made of it.
    """

    def __init__(self, index: int) -> None:
        self.index, self.name = index, f"replica {index}"
        self.state = ReplicaState.DEAD
        self.actor: Any = None
        """The process; another object after a restart."""
        self.version: int | None = None
        """What it has proved to hold."""
        self.in_hand = 0
        """Prompts that it has been given and has not answered."""
        self.progress = 0.0
        """When it last answered, or got the first prompt that it has in hand."""
        self.coming_back = False
        """Whether it is being started again."""
        self.ended = True
        """Whether nothing is left of the process that it had last."""
        self.leaving = False
        """Whether it is to be removed."""
        self._node, self._family = "", list[tuple[int, float]]()

    def to(self, state: ReplicaState) -> None:
        """Change the state; called before whatever the change stands for.

        Raises:
            EngineError: if that may not follow.
        """
        states.require(self.name, self.state, state)
        self.state = state

    def open(self, options: Mapping[str, Any]) -> None:
        """Start the process."""
        self.to(ReplicaState.STARTING)
        self.version, self.in_hand, self.ended = None, 0, False
        self._node, self._family = "", []
        self.actor = ReplicaActor.options(**options).remote()  # type: ignore[attr-defined]

    def place(self) -> Any:
        """Where it is, as a reference that Ray hands on."""
        return self.actor.place.remote()

    def start(
        self, model: str, config: EngineConfig, settings: ReplicaSettings, places: Sequence[Any], mine: int
    ) -> Future[None]:
        """Load the model; it is `mine` of the replicas at `places`, each a Place or a reference to one."""
        started: Future[None] = self.actor.start.remote(model, config, settings, mine, *places).future()
        return started

    def processes(self) -> Future[tuple[str, list[tuple[int, float]]]]:
        """What must be gone before it may be started again."""
        answer: Future[tuple[str, list[tuple[int, float]]]] = self.actor.processes.remote().future()
        return answer

    def remember(self, processes: tuple[str, list[tuple[int, float]]]) -> None:
        """Keep what `processes` said, for `end`."""
        self._node, self._family = processes

    def generate(self, request: Request, sampling: Sampling) -> Future[Group]:
        """All responses to one prompt."""
        if self.in_hand == 0:
            self.progress = time.monotonic()
        self.in_hand += 1
        answer: Future[Group] = self.actor.generate.remote(request, sampling).future()
        return answer

    def answered(self) -> None:
        """One prompt less in hand."""
        self.in_hand -= 1
        self.progress = time.monotonic()

    def logprobs(self, pairs: Sequence[TokenPair]) -> Future[list[np.ndarray]]:
        """Teacher-forced log-probs."""
        answer: Future[list[np.ndarray]] = self.actor.logprobs.remote(pairs).future()
        return answer

    def call(
        self,
        method: Callable[Concatenate[EngineReplica, Arguments], Awaitable[T]],
        *args: Arguments.args,
        **_: Arguments.kwargs,
    ) -> Future[T]:
        """Any method of the engine's replica, as its protocol has it: `call(EngineReplica.watch, names)`."""
        answer: Future[T] = self.actor.call.remote(method.__name__, *args).future()
        return answer

    def kill(self) -> None:
        """Let Ray end the process, without waiting for it."""
        if self.actor is not None:
            ray.kill(self.actor)

    def end(self) -> None:
        """End it for sure: its process and every one that it had started, also those that are stopped.

        Raises:
            EngineError: if some of them are still there.
        """
        self.kill()
        if self._family:
            self._end_family()
        # Else it had not finished starting: what is below it ends with its parent.
        self.ended = True

    def _end_family(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node_id=self._node, soft=False)
        ending = end_processes.options(scheduling_strategy=here).remote(self._family).future()
        left = outcomes({self.name: ending}, END_S, EngineError, "ending it")[self.name]
        if isinstance(left, OnlineRLError) and not any(n["Alive"] and n["NodeID"] == self._node for n in ray.nodes()):
            return  # its machine is gone, and all that ran there
        if left:
            raise EngineError(
                f"{self.name} could not be ended: {left.cause if isinstance(left, OnlineRLError) else f'processes {left} remain'}",
                fix="end them on that machine, then `onlinerl resume`",
            )
        self._family = []


def outcomes(
    futures: Mapping[str, Future[T]], timeout_s: float, error: type[OnlineRLError], what: str
) -> dict[str, T | OnlineRLError]:
    """What each replica answered, or why it did not, with one deadline for all of them.

    Args:
        futures: by the name of the replica.
        timeout_s: for all of them together.
        error: the boundary's exception.
        what: what is being done, for the messages.
    """
    wait(futures.values(), timeout=timeout_s)
    answers: dict[str, T | OnlineRLError] = {}
    for name, future in futures.items():
        answer = outcome(future, name, timeout_s, error, what)
        answers[name] = answer
    return answers


def all_of(futures: Mapping[str, Future[T]], timeout_s: float, error: type[OnlineRLError], what: str) -> list[T]:
    """The same, where everybody has to answer.

    Raises:
        OnlineRLError: as soon as one of them fails, or at the deadline.
    """
    done, _ = wait(futures.values(), timeout=timeout_s, return_when=FIRST_EXCEPTION)
    # What has failed is the cause; what others are still waiting for may be its consequence.
    first = [name for name, future in futures.items() if future in done]
    answers: dict[str, T] = {}
    for name in [*first, *(n for n in futures if n not in first)]:
        answer = outcome(futures[name], name, timeout_s, error, what)
        if isinstance(answer, OnlineRLError):
            raise answer
        answers[name] = answer
    return [answers[name] for name in futures]


def outcome(future: Future[T], name: str, timeout_s: float, error: type[OnlineRLError], what: str) -> T | OnlineRLError:
    """What one replica answered, or why it did not until now."""
    if not future.done():
        return error(
            f"{name}: {what} did not finish within {timeout_s:.0f} s", fix="look for a stuck or overloaded process on that node"
        )
    failure = future.exception()
    if failure is None:
        return future.result()
    if isinstance(failure, RayError):
        return explained(failure, name, what, error)
    raise failure
