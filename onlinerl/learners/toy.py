"""A toy learner for fast contract tests of the loop: one vector of logits, trained with the real losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.errors import ConfigError, SyncError
from onlinerl.learners._loss import kl_old, loss_of
from onlinerl.learners._plain import load_plain
from onlinerl.learners._self_test import combine, compare
from onlinerl.learners._vocabulary import collision, kl_from
from onlinerl.learners._whole_step import first_pass, initial_state, load_state, save_state, state_metrics
from onlinerl.ops.batching import collate, step_units
from onlinerl.ops.whole_step import WholeStep
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.engine import RolloutEngine
from onlinerl.protocols.learner import InProcessLearner, Learner
from onlinerl.types import Draw, Drawn, Sampling, SelfTest, SyncReport, TrainItem, TrainSequence, UpdateReport

__all__ = ["Toy", "ToyLearner", "ToySync"]


@runtime_checkable
class HasLogits(Protocol):
    """An engine whose weights are one vector of logits."""

    logits: np.ndarray

    def load(self, logits: np.ndarray, version: int) -> None:
        """Take another vector, as this version."""
        ...


class Toy(InProcessLearner):
    """For tests; reads no key but its name."""

    name: str = "toy"
    samples_mixtures: ClassVar[bool] = True

    def open(self, vocabulary: int, algorithm: Algorithm, base: str, temperature: float) -> ToyLearner:
        """A learner with uniform weights."""
        return ToyLearner(vocabulary, algorithm, base, temperature)

    def connect(self, learner: Learner, engine: RolloutEngine) -> ToySync:
        """A copy of the logits.

        Raises:
            ConfigError: if the engine has none.
        """
        assert isinstance(learner, ToyLearner), "it opened this one"
        if not isinstance(engine, HasLogits):
            raise ConfigError(
                f"the toy learner gives its logits to an engine that has `logits` and `load`, and {type(engine).__name__} has not",
                field="engine.name",
                fix="set engine.name=toy, or another learner",
            )
        return ToySync(lambda: learner.logits_of("policy"), engine.load, lambda: engine.logits, learner.logits_of)


class ToyLearner:
    """Softmax over a vocabulary, the same at every position, plus a constant value.

    Args:
        vocabulary: number of tokens.
        algorithm: whose loss is minimised.
        base: the base model.
        temperature: at which the loss takes log-probs.
    """

    def __init__(self, vocabulary: int, algorithm: Algorithm, base: str, temperature: float = 1.0) -> None:
        self._algorithm, self._base, self._temperature = algorithm, base, temperature
        self._reference = base
        self.logits = torch.zeros(vocabulary, dtype=torch.float64, requires_grad=True)
        self.value = torch.zeros((), dtype=torch.float64, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.logits, self.value], lr=1.0)
        self._state = initial_state(algorithm)

    def logprobs(
        self, sequences: Sequence[TrainSequence], *, model: str = "policy", temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Log-probs f32[T]; `model` is "policy", the base model, or a file written by `export`."""
        logprobs = torch.log_softmax(torch.tensor(self.logits_of(model)) / temperature, dim=-1).numpy()
        return [logprobs[list(s.response_ids)].astype(np.float32) for s in sequences]

    def logits_of(self, model: str) -> np.ndarray:
        """The weights of "policy", the base model, or a file written by `export`."""
        if model == "policy":
            return self.logits.detach().numpy()
        return np.zeros(len(self.logits)) if model == self._base else np.load(Path(model) / "logits.npy")

    def values(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """The same value everywhere, f32[T]."""
        return [np.full(len(s.response_ids), self.value.item(), dtype=np.float32) for s in sequences]

    def hidden_sums(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """The state after a token is that token, one of `vocabulary`; f32[vocabulary]."""
        tokens = [[s.prompt_ids[-1], *s.response_ids[:-1]] for s in sequences]
        return [np.bincount(own, minlength=len(self.logits)).astype(np.float32) for own in tokens]

    def sample_mixture(
        self, draws: Sequence[Draw], sampling: Sampling, *, reference: str, weight: float, ends: Sequence[int]
    ) -> list[Drawn]:
        """From the mixture of the two vectors; the last token of the vocabulary ends a response, whatever `ends` says."""
        mixed = (1.0 - weight) * self.logits_of("policy") + weight * self.logits_of(reference)
        logprobs = torch.log_softmax(torch.tensor(mixed) / sampling.temperature, dim=-1).numpy()
        return [self._drawn(draw, logprobs, sampling.max_new_tokens) for draw in draws]

    @staticmethod
    def _drawn(draw: Draw, logprobs: np.ndarray, most: int) -> Drawn:
        rng, end = np.random.default_rng(draw.seed), len(logprobs) - 1
        tokens: list[int] = []
        while len(tokens) < most and end not in tokens:
            tokens.append(int(rng.choice(len(logprobs), p=np.exp(logprobs))))
        return Drawn(tuple(tokens), tuple(float(logprobs[t]) for t in tokens), tokens[-1] == end)

    def update(
        self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float], *, target_kl: float | None = None
    ) -> Iterator[UpdateReport]:
        """One Adam step per element of `steps`, until `target_kl` is exceeded."""
        for items, learning_rate in zip(steps, learning_rates, strict=True):
            batch, state = collate(items), self._state
            if isinstance(self._algorithm, WholeStep):
                (batch,), state = first_pass(self._algorithm, [batch], self._outputs, lambda own: ([own], 0), state)
            outputs = self._outputs(batch)
            kl = {} if target_kl is None else {name: (m.total / m.count).item() for name, m in kl_old(outputs, batch).items()}
            if target_kl is not None and kl["kl_old"] > target_kl:
                yield UpdateReport(steps=0, tokens=0, metrics=(kl,), stopped=1)
                return
            loss = loss_of(self._algorithm, outputs, batch, trained=True)
            mean = loss.total / step_units(items, self._algorithm.unit)
            self._optimizer.param_groups[0]["lr"] = learning_rate
            self._optimizer.zero_grad()
            mean.backward()
            self._optimizer.step()
            self._state = state
            metrics = state_metrics(self._algorithm, state) | {"loss": mean.item()} | kl
            yield UpdateReport(steps=1, tokens=sum(i.tokens for i in items), metrics=(metrics,))

    def set_reference(self, model: str) -> None:
        """Which saved model the policy is compared with in the loss."""
        self._reference = model

    def _outputs(self, batch: Batch) -> Outputs:
        logits = self.logits / self._temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        entropy: Tensor = -(logprobs.exp() * logprobs).sum()
        reference = torch.tensor(self.logits_of(self._reference)) / self._temperature
        return Outputs(
            logprobs_BT=self._logprobs(batch, self.logits),
            values_BT=self.value.float().expand(batch.mask_BT.shape),
            entropy_BT=entropy.float().expand(batch.mask_BT.shape),
            collision_BT=collision(logits).float().expand(batch.mask_BT.shape),
            reference_kl_BT=kl_from(reference, logits).float().expand(batch.mask_BT.shape),
        )

    def _logprobs(self, batch: Batch, logits: Tensor) -> Tensor:
        columns = torch.arange(batch.mask_BT.shape[1])
        targets_BT = batch.tokens_BS.gather(
            1, (batch.prompt_lengths_B[:, None] + columns).clamp(max=batch.tokens_BS.shape[1] - 1)
        )
        return torch.log_softmax(logits / self._temperature, dim=-1)[targets_BT].float() * batch.mask_BT

    def self_test(self, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        """Compare what the items carry with what the policy says, and the policy with the base model."""

        def base(batch: Batch) -> Tensor:
            return self._logprobs(batch, torch.tensor(self.logits_of(base_model)))

        return combine([compare(self._outputs, base, self._algorithm, [items], torch.device("cpu"))], items, self._algorithm)

    def reset_optimizer(self) -> None:
        """Forget Adam's moments."""
        self._optimizer.state.clear()

    def save(self, path: Path) -> dict[str, int]:
        """Weights, optimizer and the algorithm's state."""
        file = path / "toy.pt"
        torch.save(
            {"logits": self.logits.detach(), "value": self.value.detach(), "optimizer": self._optimizer.state_dict()}, file
        )
        return {written.name: written.stat().st_size for written in (file, *save_state(path, self._state))}

    def load(self, path: Path) -> None:
        """The reverse of `save`."""
        self._state = load_state(path, self._algorithm)
        state = load_plain(path / "toy.pt")
        with torch.no_grad():
            self.logits.copy_(state["logits"])
            self.value.copy_(state["value"])
        self._optimizer.load_state_dict(state["optimizer"])

    def export(self, path: Path) -> None:
        """The logits."""
        np.save(path / "logits.npy", self.logits.detach().numpy())

    def average(self, reference: str, weight: float, path: Path) -> None:
        """Write (1 - weight) * reference + weight * policy, logits in their own dtype."""
        start, end = self.logits_of(reference), self.logits_of("policy")
        np.save(path / "logits.npy", end if weight == 1 else start + weight * (end - start))

    def keep_weights(self) -> None:
        """Not here: `Toy.merges` is false."""
        raise NotImplementedError

    def merge(self, seed: int) -> None:
        """Not here: `Toy.merges` is false."""
        raise NotImplementedError


class ToySync:
    """A push within one process, proved like the real ones: copies an array from `read` to `write`, and compares what `held` then says.

    Args:
        read: the learner's weights.
        write: gives weights and version to the engine.
        held: the engine's weights.
        saved: those of a saved model, by its path; without it only the learner's own are pushed.
    """

    def __init__(
        self,
        read: Callable[[], np.ndarray],
        write: Callable[[np.ndarray, int], None],
        held: Callable[[], np.ndarray],
        saved: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        self._read, self._write, self._held, self._saved = read, write, held, saved

    def push(self, version: int, model: str = "policy") -> SyncReport:
        """Copy and compare.

        Raises:
            SyncError: if the engine does not hold what the learner holds.
        """
        started = time.monotonic()
        weights = self._read() if model == "policy" or self._saved is None else self._saved(model)
        self._write(weights, version)
        if not np.array_equal(self._held(), weights):
            raise SyncError("the engine does not hold the learner's weights", field="sync", fix="this is a bug of the toy")
        seconds = time.monotonic() - started
        return SyncReport(
            version=version,
            seconds=seconds,
            bytes=weights.nbytes,
            replicas=1,
            backend="toy",
            phases={"push": seconds},
            proved=True,
            tensors_checked=1,
            canary_nats=0.0,
        )
