"""The ranks of the learner as one Learner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from onlinerl.cluster.colocation import Turn, Turns
from onlinerl.cluster.runtime import Cluster, explained, get
from onlinerl.config import RunConfig
from onlinerl.errors import LearnerError, LearnerLost, OnlineRLError
from onlinerl.learners._self_test import combine
from onlinerl.ops.batching import plan_step
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.learner import LearnerConfig, LearnerRank, RankSettings
from onlinerl.types import Draw, Drawn, Sampling, SelfTest, TrainItem, TrainSequence, UpdateReport

T = TypeVar("T")
LOST_S = 10.0
"""How long after the failure of one rank it may take until it is known that another one is gone."""


@ray.remote
class RankActor:
    """A rank in a process of its own."""

    def host(self, timeout_s: float) -> tuple[str, int]:
        """Rank 0 only: open the place where the ranks meet. Returns its address and port."""
        from datetime import timedelta

        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
        return address, self._store.port

    def start(self, address: str, port: int, rank: int, config: LearnerConfig, settings: RankSettings) -> None:
        """Meet the others and load the model."""
        from datetime import timedelta

        from torch.distributed import TCPStore

        timeout = timedelta(seconds=config.start_timeout_s)
        store = self._store if rank == 0 else TCPStore(address, port, timeout=timeout)
        self._rank: LearnerRank = config.rank(settings, rank=rank, store=store, address=address)

    def call(self, method: str, *args: Any) -> Any:
        """A method of the rank, by its name in `LearnerRank`; `LearnerGroup.call` is how it is asked for."""
        return getattr(self._rank, method)(*args)


class LearnerGroup:
    """Cuts work up so that every rank gets its share and the same number of micro-batches; a `protocols.learner.Learner`.

    Args:
        cluster: where the ranks run.
        config: of the run.
        algorithm: whose loss is minimised.
        temperature: at which the loss takes log-probs.
        turns: with the engine, on shared GPUs.
    """

    def __init__(self, cluster: Cluster, config: RunConfig, algorithm: Algorithm, temperature: float, turns: Turns) -> None:
        self._config, self._algorithm, self._turns = config.learner, algorithm, turns
        self._model = config.model
        self.dtype: str = config.learner.dtype
        """Of its weights."""
        ranks = config.learner.ranks
        threads = config.learner.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
        env = config.learner.environment(cluster.device, threads)
        self.names = [f"learner rank {i}" for i in range(ranks)]
        self.actors = [
            RankActor.options(**cluster.options(i, env)).remote()  # type: ignore[attr-defined]
            for i in range(ranks)
        ]
        timeout_s = config.learner.start_timeout_s
        self.address, port = get(
            self.actors[0].host.remote(timeout_s), timeout_s=timeout_s, error=LearnerError, what="starting"
        )
        settings = RankSettings(
            model=config.model,
            algorithm=algorithm,
            training=config.training,
            world_size=ranks,
            device=cluster.device,
            temperature=temperature,
            seed=config.seed,
        )
        self._started = {
            n: a.start.remote(self.address, port, i, config.learner, settings)
            for i, (n, a) in enumerate(zip(self.names, self.actors, strict=True))
        }

    def wait_started(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Return once every rank has loaded the model.

        Args:
            meanwhile: called now and then; what it raises ends the waiting.

        Raises:
            LearnerError: with the rank's own error.
        """
        limit = self._config.start_timeout_s
        get(self._started, timeout_s=limit, error=LearnerError, what="starting the learner", meanwhile=meanwhile)

    def call(self, method: Callable[..., T], *args: Any, timeout_s: float | None = None, turn: Turn = "learner") -> list[T]:
        """The same method of `LearnerRank` with the same arguments on every rank."""
        return self.scatter(method, [args] * len(self.actors), timeout_s=timeout_s, turn=turn)

    def scatter(
        self,
        method: Callable[..., T],
        arguments: Sequence[tuple[Any, ...]],
        timeout_s: float | None = None,
        turn: Turn = "learner",
    ) -> list[T]:
        """The same method on every rank, each with its own arguments. `turn`: when it may happen (`both`: during a push)."""
        self._turns.need(turn)
        return self._on_all(method, arguments, timeout_s)

    def offload(self, what: str, timeout_s: float | None = None) -> None:
        """Give the GPUs' memory to the engine: "optimizer" is all but the policy's weights, "all" is all."""
        self._on_all(LearnerRank.offload, [(what,)] * len(self.actors), timeout_s)

    def reload(self, timeout_s: float | None = None) -> None:
        """Take it back."""
        self._on_all(LearnerRank.reload, [()] * len(self.actors), timeout_s)

    def _on_all(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], timeout_s: float | None) -> list[T]:
        name = method.__name__
        refs = {n: a.call.remote(name, *args) for n, a, args in zip(self.names, self.actors, arguments, strict=True)}
        # Whoever gives a deadline of its own waits for others too, and knows better whose fault it is when it passes.
        late = LearnerLost if timeout_s is None else LearnerError
        deadline = timeout_s or self._config.step_timeout_s
        try:
            answers: list[T] = get(refs, timeout_s=deadline, error=LearnerError, what=name, lost=LearnerLost, late=late)
            return answers
        except LearnerLost:
            raise
        except OnlineRLError:
            # A rank often fails because another one is gone, and says so first.
            _require_alive(refs, name)
            raise

    def logprobs(
        self,
        sequences: Sequence[TrainSequence],
        *,
        model: str = "policy",
        temperature: float = 1.0,
        timeout_s: float | None = None,
    ) -> list[np.ndarray]:
        """Log-probs f32[T] of each response."""
        return self._spread(LearnerRank.logprobs, sequences, model, temperature, timeout_s=timeout_s)

    def values(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """Critic values f32[T] of each response."""
        return self._spread(LearnerRank.values, sequences)

    def hidden_sums(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """f32[H] of each response."""
        return self._spread(LearnerRank.hidden_sums, sequences)

    def sample_mixture(
        self, draws: Sequence[Draw], sampling: Sampling, *, reference: str, weight: float, ends: Sequence[int]
    ) -> list[Drawn]:
        """A response of the mixture to each prompt."""
        longest = range(sampling.max_new_tokens)
        room = [TrainSequence(prompt_ids=draw.prompt_ids, response_ids=longest) for draw in draws]
        items = [TrainItem(prompt_id=str(i), sequences=(sequence,)) for i, sequence in enumerate(room)]
        work = plan_step(items, len(self.actors), 2 * self._config.tokens_per_microbatch)
        arguments = [
            ([[draws[int(i.prompt_id)] for i in micro] for micro in rank], sampling, reference, weight, ends) for rank in work
        ]
        found: dict[int, Drawn] = {}
        for rank, outputs in zip(work, self.scatter(LearnerRank.sample_mixture, arguments), strict=True):
            for micro, said in zip(rank, outputs, strict=True):
                found |= {int(item.prompt_id): one for item, one in zip(micro, said, strict=True)}
        return [found[i] for i in range(len(draws))]

    def _spread(
        self,
        method: Callable[..., list[list[np.ndarray]]],
        sequences: Sequence[TrainSequence],
        *more: Any,
        timeout_s: float | None = None,
    ) -> list[np.ndarray]:
        if not sequences:
            return []
        # The position travels as the item's id, so that results find their way back whatever the order of work.
        items = [TrainItem(prompt_id=str(i), sequences=(_bare(s),)) for i, s in enumerate(sequences)]
        # Without a backward pass a micro-batch takes a fraction of the memory.
        work = self._plan(items, 2)
        arguments = [([[item.sequences[0] for item in micro] for micro in rank], *more) for rank in work]
        results: list[np.ndarray | None] = [None] * len(items)
        for rank, outputs in zip(work, self.scatter(method, arguments, timeout_s), strict=True):
            for micro, arrays in zip(rank, outputs, strict=True):
                for item, array in zip(micro, arrays, strict=True):
                    results[int(item.prompt_id)] = array
        return [r for r in results if r is not None]

    def _plan(self, items: Sequence[TrainItem], times: int = 1) -> list[list[list[TrainItem]]]:
        """Items by rank and micro-batch, which holds so many times what one of a training step may hold."""
        budget = times * self._config.tokens_per_microbatch
        return plan_step(items, len(self.actors), budget, padding_free=self._config.padding_free)

    def update(
        self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float], *, target_kl: float | None = None
    ) -> Iterator[UpdateReport]:
        """One optimizer step per element of `steps`, a report after each, until `target_kl` is exceeded."""
        target = () if target_kl is None else (target_kl,)  # ranks that know nothing of one go on as before
        for items, learning_rate in zip(steps, learning_rates, strict=True):
            work = self._plan(list(items))
            count = sum(item.count(self._algorithm.unit) for item in items)
            metrics = self.scatter(LearnerRank.step, [(rank, count, learning_rate, *target) for rank in work])[0]
            if metrics.pop("stopped", 0):
                yield UpdateReport(steps=0, tokens=0, metrics=(metrics,), stopped=1)
                return
            yield UpdateReport(
                steps=1, tokens=sum(i.tokens for i in items), metrics=(metrics,), skipped=int(metrics["skipped"])
            )

    def self_test(self, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        """Cut up as a training step would be."""
        work = self._plan(items)
        parts = self.scatter(LearnerRank.self_test, [(rank, base_model) for rank in work])[0]
        return combine(parts, items, self._algorithm)

    def set_reference(self, model: str) -> None:
        """Which saved model the policy is compared with in the loss."""
        self.call(LearnerRank.set_reference, model)

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments."""
        self.call(LearnerRank.reset_optimizer)

    def save(self, path: Path) -> dict[str, int]:
        """Weights, optimizer and RNG states of all ranks. Returns what was written: bytes by relative path.

        Raises:
            LearnerError: if a rank wrote nothing.
        """
        written = dict(zip(self.names, self.call(LearnerRank.save, str(path)), strict=True))
        idle = [name for name, files in written.items() if not files]
        if idle:
            raise LearnerError(f"{', '.join(idle)} wrote nothing to {path}", fix="look for its error in the Ray logs")
        return {name: size for files in written.values() for name, size in files.items()}

    def load(self, path: Path) -> None:
        """The reverse of `save`."""
        self.call(LearnerRank.load, str(path))

    def export(self, path: Path) -> None:
        """The policy in Hugging Face format."""
        self.call(LearnerRank.export, str(path), self._model)

    def average(self, reference: str, weight: float, path: Path) -> None:
        """Write (1 - weight) * reference + weight * policy in float32."""
        self.call(LearnerRank.average, reference, weight, str(path))

    def keep_weights(self) -> None:
        """Remember the policy's weights as they are now, for `merge`."""
        self.call(LearnerRank.keep_weights)

    def merge(self, seed: int) -> None:
        """What has changed since then, merged with another change."""
        self.call(LearnerRank.merge, seed)

    def shutdown(self) -> None:
        """End all ranks."""
        refs = [a.call.remote(LearnerRank.shutdown.__name__) for a in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=10)
        for actor in self.actors:
            ray.kill(actor)


def _require_alive(refs: Mapping[str, Any], what: str) -> None:
    """Look whether a rank is gone, once a call to all of them has failed.

    Raises:
        LearnerLost: naming it.
    """
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=LOST_S)
    for name, ref in refs.items():
        try:
            ray.get(ref, timeout=0)
        except RayActorError as gone:
            raise explained(gone, name, what, LearnerError, LearnerLost) from gone
        except (RayError, OnlineRLError):
            continue


def _bare(sequence: TrainSequence) -> TrainSequence:
    """Only what log-probs depend on: arrays need not travel."""
    return TrainSequence(prompt_ids=sequence.prompt_ids, response_ids=sequence.response_ids)
