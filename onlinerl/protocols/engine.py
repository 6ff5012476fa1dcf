"""The role of rollout engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import CustomResources, Resumable, Seconds
from onlinerl.types import Group, Request, Sampling


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Group]]:
        """Groups in the order in which they finish, in lists of what has finished since the last one: each list is written at once."""
        ...

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Teacher-forced log-probs of (prompt, response) tokens under the engine's weights: f32[T] each."""
        ...


class EngineConfig(Component):
    """An engine as it is configured: the keys that every engine has, and how this one is checked and started.

    One that runs on the cluster says how a process of its own becomes a replica; see `InProcessEngine` for the others.
    """

    name: str = ""
    replicas: Resumable[int] = Field(1, ge=1)
    """Copies of the model that sample in parallel, from one queue of prompts."""
    tensor_parallel_size: Resumable[int] = Field(1, ge=1)
    """Workers that one replica is split over: each needs a GPU, or a core on CPU, of one machine."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of its weights and computation."""
    max_concurrent: Resumable[int] = Field(64, ge=1)
    """Sequences that one replica works on at a time."""
    max_model_len: int | None = Field(None, ge=8)
    """Longest prompt plus response; derived from the budgets by default."""
    cpus: Resumable[int] = Field(1, ge=0)
    """CPUs reserved per replica."""
    threads: Resumable[int | None] = Field(None, ge=1)
    """Threads a CPU replica computes with, over all its workers; by default its machine's cores, shared with the other replicas there
    (rollouts and training take turns). Never more than there are cores."""
    resources: Resumable[CustomResources] = Field(default_factory=dict)
    """Extra Ray resources per replica, e.g. {rollout_node: 1} to choose a node."""
    start_timeout_s: Resumable[Seconds] = 900
    generate_timeout_s: Resumable[Seconds] = 1800
    """Longest wait for the next response of a replica; one that says nothing for longer is given up."""
    max_restarts: Resumable[int | None] = Field(None, ge=0)
    """How often replicas that died, hung or gave impossible answers are started again in one attempt, all together: 3 by default, and
    after a resume as often again. Used up, the run goes on without them. 0: the first one ends the run, as on shared GPUs
    (cluster.colocate)."""
    min_replicas: Resumable[int] = Field(1, ge=1)
    """While fewer serve, the run waits for those that are being started again; it ends if there are none."""
    max_rejected: Resumable[float] = Field(0.1, ge=0, le=1)
    """Largest share of a phase's responses that may be thrown away, because their log-probs were unusable or the engine gave up on
    them, before the run stops."""

    in_process: ClassVar[bool] = False
    """Whether it runs in the controller's own process; the learner then must, too."""

    def check(self, model: Mapping[str, Any], max_model_len: int, *, on_cpu: bool, alone: bool) -> None:
        """Refuse what the engine would only refuse once it has started.

        Args:
            model: the contents of the model's config.json.
            max_model_len: longest prompt plus response.
            on_cpu: whether it is known to run on CPUs.
            alone: whether all of it runs on this machine.

        Raises:
            ConfigError: naming the field.
        """

    def check_shared(self) -> None:
        """Refuse what is not possible on GPUs that are shared with the learner.

        Raises:
            ConfigError: naming the field.
        """

    def environment(self, sync_backend: str) -> dict[str, str]:
        """Environment variables that a replica's process must start with."""
        raise NotImplementedError

    def replica(self, model: str, places: Sequence[Any], index: int, settings: Mapping[str, Any]) -> Any:
        """Make this process replica `index`.

        Args:
            model: directory or hub id.
            places: where all replicas run (`engines._fit.Place`).
            index: of this one.
            settings: `device`, `max_model_len`, `sync_backend` and `seed`.
        """
        raise NotImplementedError


class InProcessEngine(EngineConfig):
    """An engine that runs in the controller's own process."""

    in_process: ClassVar[bool] = True

    def open(self, vocabulary: int, decode: Callable[[Sequence[int]], str]) -> Any:
        """A RolloutEngine.

        Args:
            vocabulary: number of tokens.
            decode: token ids -> text.
        """
        raise NotImplementedError
