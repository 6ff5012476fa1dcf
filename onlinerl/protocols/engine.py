"""The role of rollout engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import CustomResources, Resumable, Seconds
from onlinerl.protocols.transport import TransportConfig
from onlinerl.types import Group, Request, Sampling


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sequence[Group]]:
        """Groups in the order in which they finish, in lists of what has finished since the last one: each list is written at once."""
        ...

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Teacher-forced log-probs of (prompt, response) tokens under the engine's weights: f32[T] each."""
        ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica runs."""

    host: str
    cores: tuple[int, ...]
    """The cores that its process may use there."""


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """What a replica is told beside the engine section."""

    device: Literal["cpu", "cuda"]
    colocated: bool
    """Whether it shares its GPU with a rank of the learner."""
    max_model_len: int
    """Longest prompt plus response, in tokens."""
    transport: TransportConfig
    """How it gets its weights."""
    seed: int
    """Of the engine; every request carries its own on top."""


class EngineReplica(Protocol):
    """One replica of an engine that runs on the cluster, in a process of its own: all that the cluster calls on it.

    Many requests are under way at once. Anything that goes wrong is an EngineError.
    """

    async def generate(self, request: Request, sampling: Sampling) -> Group:
        """A response to the prompt for each seed, and why there is none where it cannot be used."""
        ...

    async def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        """Log-probs f32[T] of given response tokens, by teacher forcing at temperature 1."""
        ...

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a transfer, as the sending half of the transport describes it; an update that was left half-open is given up."""
        ...

    async def start_weight_update(self) -> None:
        """Open an update."""
        ...

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights, as the sending half describes them."""
        ...

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close an update and take on its version."""
        ...

    async def load_weights(self, path: str, version: int, dtypes: Sequence[str]) -> None:
        """Take on a version from a model on disk: every weight, rounded to these dtypes in turn."""
        ...

    async def reset_caches(self) -> None:
        """Forget everything computed with older weights."""
        ...

    async def weight_version(self) -> str:
        """The version that the engine itself reports."""
        ...

    async def watch(self, names: list[str]) -> None:
        """Record checksums of these tensors when they arrive."""
        ...

    async def received(self) -> dict[str, str]:
        """Checksums recorded since `watch`; of a tensor that differs between workers or did not reach all of them, that it does."""
        ...

    async def sleep(self) -> None:
        """Give the GPU's memory back; weights stay in host memory. Asked only of those that share a GPU."""
        ...

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take it again: "weights" before a push, "kv_cache" after it, or everything."""
        ...

    async def process_ids(self) -> list[int]:
        """Process ids of the workers, as they say themselves: who answers is alive."""
        ...

    async def shutdown(self) -> None:
        """End everything that it has started."""
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
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of its weights and computation. `auto`: bfloat16, but float32 on CPUs that have no instructions for it and would be many times
    slower. It is decided where the run starts, and kept with it."""
    max_num_seqs: Resumable[int] = Field(64, ge=1)
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
    forces_prefixes: ClassVar[bool] = False
    """Whether responses may begin with given tokens (`Request.prefix_ids`)."""
    joins_transfers: ClassVar[bool] = True
    """Whether its replicas can join a transfer of vLLM's weight-transfer API; otherwise they load files (`sync.backend: disk`)."""

    @property
    def cache_bytes(self) -> float:
        """Memory that one worker of a replica on a CPU takes for its KV cache, as far as that is known before it starts."""
        return 0.0

    @property
    def gpus(self) -> int:
        """GPUs that one replica needs where it runs on GPUs."""
        return self.tensor_parallel_size

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

    def environment(self) -> dict[str, str]:
        """Environment variables that a replica's process must start with."""
        raise NotImplementedError

    async def replica(self, model: str, places: Sequence[Place], index: int, settings: ReplicaSettings) -> EngineReplica:
        """Make this process replica `index`; returns once it has loaded the model.

        Args:
            model: directory or hub id.
            places: where all replicas run.
            index: of this one.
            settings: what else it is told.
        """
        raise NotImplementedError


class InProcessEngine(EngineConfig):
    """An engine that runs in the controller's own process."""

    in_process: ClassVar[bool] = True

    def open(self, vocabulary: int, decode: Callable[[Sequence[int]], str]) -> RolloutEngine:
        """What generates.

        Args:
            vocabulary: number of tokens.
            decode: token ids -> text.
        """
        raise NotImplementedError
