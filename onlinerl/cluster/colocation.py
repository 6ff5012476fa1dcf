"""Whose turn it is on GPUs that learner ranks and replicas share: the whole choreography, in one place.

A GPU does not hold an awake engine and a loaded learner at once, so one of them gives its memory to the other before that one
takes it. What happens at each change of turns, in this order:

    start             the engine loads, then sleeps; then the learner loads
    learner -> both   the optimizer and everything but the policy's weights go to host memory; the engine's weights come back,
                      without a KV cache: what a push needs
    both -> engine    the policy's weights go to host memory; the KV cache comes back
    learner -> engine the same two without a push between them: the engine's weights are still the current ones
    engine -> learner the engine sleeps: weights to host memory, KV cache dropped; all of the learner comes back
    both -> learner   the same, after a push that failed

Where engine and learner have GPUs of their own, or there are none, turns are taken in the same way and nothing is moved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from onlinerl.errors import ClusterError, ConfigError, OnlineRLError

Turn = Literal["engine", "learner", "both"]
"""Who may work. `both` is the moment of a push: the learner can send its weights, the engine can receive them, nothing else."""
Step = Literal[
    "engine sleeps",
    "engine wakes: weights",
    "engine wakes: kv_cache",
    "engine wakes: all",
    "learner leaves: optimizer",
    "learner leaves: all",
    "learner returns",
]

STEPS: Mapping[tuple[str, Turn], Sequence[Step]] = {
    ("learner", "both"): ("learner leaves: optimizer", "engine wakes: weights"),
    ("both", "engine"): ("learner leaves: all", "engine wakes: kv_cache"),
    ("learner", "engine"): ("learner leaves: all", "engine wakes: all"),
    ("engine", "learner"): ("engine sleeps", "learner returns"),
    ("both", "learner"): ("engine sleeps", "learner returns"),
}
"""Every change of turns that there is."""


class SleepingEngine(Protocol):
    """What is asked of the replicas."""

    def wait_started(self) -> None:
        """Return once every replica has loaded its model."""
        ...

    def require_starting(self) -> None:
        """Refuse to go on if a replica has failed to load its model; returns at once."""
        ...

    def sleep(self, timeout_s: float | None = None) -> None:
        """Weights to host memory, KV cache dropped."""
        ...

    def wake_up(self, what: str, timeout_s: float | None = None) -> None:
        """Take back "weights", "kv_cache", or "all"."""
        ...


class LeavingLearner(Protocol):
    """What is asked of the learner's ranks."""

    def wait_started(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Return once every rank has loaded the model; what `meanwhile` raises ends the waiting."""
        ...

    def offload(self, what: str, timeout_s: float | None = None) -> None:
        """To host memory: "optimizer" (all but the policy's weights), or "all"."""
        ...

    def reload(self, timeout_s: float | None = None) -> None:
        """Everything comes back."""
        ...


class Turns:
    """Knows whose turn it is, and changes it.

    Args:
        shared: whether engine and learner share GPUs. If not, turns are only counted.
    """

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        self._one_at_a_time = threading.RLock()
        self.turn: str = "starting"
        self._engine: SleepingEngine | None = None
        self._learner: LeavingLearner | None = None

    def engine_starts(self, engine: SleepingEngine) -> None:
        """Call it when the replicas have begun to load, and before the learner begins to."""
        self._engine = engine
        if self.shared:
            engine.wait_started()
            engine.sleep()

    def learner_starts(self, learner: LeavingLearner) -> None:
        """Call it when the learner has begun to load. Returns once both are there; the learner has the first turn."""
        assert self._engine is not None, "the engine starts first"
        self._learner = learner
        if self.shared:
            learner.wait_started()
        else:  # they load side by side; a replica that fails is said at once, not when the learner is there
            learner.wait_started(self._engine.require_starting)
            self._engine.wait_started()
        self.turn = "learner"

    def need(self, turn: Turn) -> None:
        """Whoever is about to do work says so first; takes over from the other one.

        Raises:
            ClusterError: while a push is under way or has failed: only the push itself goes on from there.
        """
        with self._one_at_a_time:  # two phases may need the engine at the same moment
            if turn == self.turn:
                return
            if "both" in (turn, self.turn):
                raise self._illegal(turn)
            self.move(turn)

    def move(self, turn: Turn, timeout_s: float | None = None) -> None:
        """Change turns, if it is not that turn already. Called by a push, which is the only one to take and leave `both`.

        Raises:
            ClusterError: before anything is moved, if there is no such change.
            EngineError, LearnerError: if a part cannot give or take its memory; whose turn it is then is not known any more.
        """
        if turn == self.turn:
            return
        steps = STEPS.get((self.turn, turn))
        if steps is None:
            raise self._illegal(turn)
        if self.shared:
            self.turn = "unknown"
            for step in steps:
                self._do(step, timeout_s)
        self.turn = turn

    def _do(self, step: Step, timeout_s: float | None) -> None:
        assert self._engine is not None
        assert self._learner is not None
        _, _, what = step.partition(": ")
        try:
            match step:
                case "engine sleeps":
                    self._engine.sleep(timeout_s)
                case "engine wakes: weights" | "engine wakes: kv_cache" | "engine wakes: all":
                    self._engine.wake_up(what, timeout_s)
                case "learner leaves: optimizer" | "learner leaves: all":
                    self._learner.offload(what, timeout_s)
                case "learner returns":
                    self._learner.reload(timeout_s)
        except OnlineRLError as error:
            raise type(error)(
                f"on a shared GPU, {step!r} failed: {error.cause}",
                field="cluster.colocate",
                fix="if memory ran out, lower engine.gpu_memory_utilization (what the engine takes when it wakes) or "
                "learner.tokens_per_microbatch; then `onlinerl resume`",
            ) from error

    def _illegal(self, turn: Turn) -> ClusterError:
        return ClusterError(
            f"the {turn} cannot have the next turn: now it is {self.turn!r}",
            field="cluster.colocate",
            fix="a push or a change of turns has failed before: `onlinerl resume` starts both parts anew",
        )


def require_gpus(device: str, colocate: bool) -> None:
    """Refuse to share GPUs on a cluster that turned out to have none (`cluster.device: auto`).

    Raises:
        ConfigError: naming the field.
    """
    if device == "cpu" and colocate:
        raise ConfigError("needs GPUs, and the cluster has none", field="cluster.colocate", fix="leave it out on CPUs")
