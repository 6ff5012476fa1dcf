"""The ranks of a learner as one, wherever they are: work is cut up among them, and what they say is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from onlinerl.errors import LearnerError
from onlinerl.learners._self_test import combine
from onlinerl.ops.batching import plan_step, step_units
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.learner import LearnerConfig, LearnerRank
from onlinerl.types import Draw, Drawn, Sampling, SelfTest, TrainItem, TrainSequence, UpdateReport

T = TypeVar("T")


class RankGroup:
    """Cuts work up so that every rank gets its share and the same number of micro-batches. A subclass knows how a rank is asked.

    Args:
        config: the learner section.
        algorithm: whose loss is minimised.
        model: that training begins with, and whose tokenizer goes with exports.
    """

    names: list[str]
    """Of the ranks, for messages."""

    def __init__(self, config: LearnerConfig, algorithm: Algorithm, model: str) -> None:
        self._config, self._algorithm, self._model = config, algorithm, model
        self.dtype: str = config.dtype
        """Of its weights."""

    @property
    def ranks(self) -> int:
        """How many there are."""
        raise NotImplementedError

    def scatter(
        self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], timeout_s: float | None = None
    ) -> list[T]:
        """The same method of `LearnerRank` on every rank, each with its own arguments; what they answer, by rank."""
        raise NotImplementedError

    def call(self, method: Callable[..., T], *args: Any, timeout_s: float | None = None) -> list[T]:
        """The same method with the same arguments on every rank."""
        return self.scatter(method, [args] * self.ranks, timeout_s)

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

    def rewards(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """f32[D] of each sequence, by a reward or preference model."""
        return self._spread(LearnerRank.rewards, sequences)

    def sample_mixture(
        self, draws: Sequence[Draw], sampling: Sampling, *, reference: str, weight: float, ends: Sequence[int]
    ) -> list[Drawn]:
        """A response of the mixture to each prompt."""
        longest = range(sampling.max_new_tokens)
        room = [TrainSequence(prompt_ids=draw.prompt_ids, response_ids=longest) for draw in draws]
        items = [TrainItem(prompt_id=str(i), sequences=(sequence,)) for i, sequence in enumerate(room)]
        work = plan_step(items, self.ranks, 2 * self._config.tokens_per_microbatch)
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
        return plan_step(items, self.ranks, budget, padding_free=self._config.padding_free)

    def update(
        self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float], *, target_kl: float | None = None
    ) -> Iterator[UpdateReport]:
        """One optimizer step per element of `steps`, a report after each, until `target_kl` is exceeded."""
        target = () if target_kl is None else (target_kl,)  # ranks that know nothing of one go on as before
        for items, learning_rate in zip(steps, learning_rates, strict=True):
            work = self._plan(list(items))
            count = step_units(items, self._algorithm.unit)
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


def _bare(sequence: TrainSequence) -> TrainSequence:
    """Only what log-probs depend on: arrays need not travel."""
    return TrainSequence(prompt_ids=sequence.prompt_ids, response_ids=sequence.response_ids)
