"""The role of learners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from onlinerl.protocols.adapters import LoraConfig
from onlinerl.protocols.component import Component
from onlinerl.protocols.keys import CustomResources, Resumable, Seconds
from onlinerl.types import Draw, Drawn, Sampling, SelfTest, TrainItem, TrainSequence, UpdateReport

if TYPE_CHECKING:  # torch stays out of everything that only names the role
    import torch

    from onlinerl.config import TrainingConfig
    from onlinerl.learners._self_test import Sums
    from onlinerl.protocols.algorithm import Algorithm
    from onlinerl.protocols.engine import RolloutEngine
    from onlinerl.protocols.sync import WeightSync
    from onlinerl.protocols.transport import Meeting, Replicas, TransportConfig


class TensorMeta(NamedTuple):
    """A tensor on the wire."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """The policy's weights as a transport takes them: what it is going to get, and then, as often as it asks, the tensors themselves.

    Where weights are cut up among ranks, all of them iterate in lockstep. Parameters of one layer come together.
    """

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, wire dtype and full shape of every tensor, in the order in which they come."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor once, whole, in the wire dtype."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Holds the policy and its optimizer."""

    def logprobs(self, sequences: Sequence[TrainSequence], *, model: str, temperature: float) -> list[np.ndarray]:
        """Log-probs f32[T] of each response under `model`: "policy", or the path of a saved model."""
        ...

    def values(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """Critic values f32[T] of each response."""
        ...

    def hidden_sums(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """f32[H] of each response: the sum of the policy's last hidden states from the last prompt token to the last but one of the response,
        which leaves its end-of-sequence token out. For algorithms with `Needs.ches`."""

    def sample_mixture(
        self, draws: Sequence[Draw], sampling: Sampling, *, reference: str, weight: float, ends: Sequence[int]
    ) -> list[Drawn]:
        """A response to each prompt, each with a generator of its own seed, drawn at every position from softmax((1 - weight) policy logits +
        weight reference logits) at the sampling's temperature. Only of learners that say so (`LearnerConfig.samples_mixtures`).

        Args:
            draws: prompts and seeds.
            sampling: temperature and longest response.
            reference: "policy", or the path of a saved model.
            weight: of the reference.
            ends: tokens after which a response ends, beside those that the model itself names.
        """
        ...

    def update(
        self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float], *, target_kl: float | None = None
    ) -> Iterator[UpdateReport]:
        """Take one optimizer step per element of `steps`, yielding a report after each.

        With `target_kl` the items carry `old_logprobs`, of the weights before the first step. A step before which the KL to them, in nats per
        token and estimated on the step's own tokens, exceeds it is not taken, nor any after it: its report, the last one, says `stopped` and, as the metric `kl_old`, that KL.
        """
        ...

    def self_test(self, items: Sequence[TrainItem], base_model: str) -> SelfTest:
        """Before the first step: compare what the items carry with what the policy says, and the policy with the base model on disk."""
        ...

    def set_reference(self, model: str) -> None:
        """Which saved model the policy is compared with in the loss, for algorithms with `Needs.reference_kl`; never the policy itself,
        which moves."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments."""
        ...

    def save(self, path: Path) -> Mapping[str, int]:
        """Weights, optimizer and RNG states of all ranks, for exact continuation. Returns what was written: bytes by relative path."""
        ...

    def load(self, path: Path) -> None:
        """The reverse of `save`."""
        ...

    def export(self, path: Path) -> None:
        """The policy in Hugging Face format."""
        ...

    def average(self, reference: str, weight: float, path: Path) -> None:
        """Write the model (1 - weight) * reference + weight * policy in float32, as a saved model.

        Args:
            reference: the base model, or the path of what `average` has written.
            weight: of the policy, above 0 and up to 1, where it is the policy as it was exported, bit for bit.
            path: an existing directory.
        """
        ...

    def keep_weights(self) -> None:
        """Remember the policy's weights as they are now, for `merge`."""
        ...

    def merge(self, seed: int) -> None:
        """What has changed since `keep_weights`, merged with another change as `training.online_merging` says. `seed`: of what is dropped."""
        ...


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """What every rank of a learner is told beside the learner section."""

    model: str
    """Directory or hub id of the model to start from."""
    algorithm: Algorithm
    training: TrainingConfig
    world_size: int
    """How many ranks there are."""
    device: Literal["cpu", "cuda"]
    """"cuda" is the one GPU that a rank sees."""
    temperature: float
    """At which log-probs are taken in the loss: the sampling temperature for policy gradients, else 1."""
    seed: int
    """Of everything random."""


class LearnerRank(Protocol):
    """One rank of a learner that runs on the cluster, in a process of its own: all that the cluster calls on it.

    Every call is made on all ranks at once, and every rank gets the same number of micro-batches. Anything that goes wrong is a
    LearnerError.
    """

    def logprobs(self, micro: Sequence[Sequence[TrainSequence]], model: str, temperature: float) -> list[list[np.ndarray]]:
        """Log-probs f32[T] per sequence per micro-batch, under "policy" or the path of a saved model."""
        ...

    def values(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """Critic values f32[T] per sequence per micro-batch."""
        ...

    def hidden_sums(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """f32[H] per sequence per micro-batch; see `Learner.hidden_sums`."""
        ...

    def rewards(self, micro: Sequence[Sequence[TrainSequence]]) -> list[list[np.ndarray]]:
        """f32[D] per sequence per micro-batch, of a reward or preference model; see `RewardLearner.rewards`."""
        ...

    def step(
        self, micro: Sequence[Sequence[TrainItem]], count: float, learning_rate: float, target_kl: float | None = None
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches.

        Args:
            micro: micro-batches of this rank; an empty one only takes part in collectives.
            count: units of the loss in the whole step, all ranks.
            learning_rate: for this step.
            target_kl: see `Learner.update`.

        Returns:
            Loss, gradient norm and the algorithm's metrics, averaged over all ranks; "skipped" is 1 if nothing was updated because the
            gradient is not finite, "stopped", with `target_kl`, 1 if because the KL, `kl_old`, exceeds it.
        """
        ...

    def sample_mixture(
        self, micro: Sequence[Sequence[Draw]], sampling: Sampling, reference: str, weight: float, ends: Sequence[int]
    ) -> list[list[Drawn]]:
        """See `Learner.sample_mixture`; per draw per micro-batch."""
        ...

    def self_test(self, micro: Sequence[Sequence[TrainItem]], base_model: str) -> list[Sums]:
        """See `SelfTest`; what each rank found about its micro-batches, by rank."""
        ...

    def set_reference(self, model: str) -> None:
        """Which saved model the policy is compared with in the loss, for algorithms with `Needs.reference_kl`."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments."""
        ...

    def save(self, path: str) -> dict[str, int]:
        """Weights, optimizer and generators. Returns what this rank wrote: bytes by path relative to `path`."""
        ...

    def load(self, path: str) -> None:
        """The reverse of `save`."""
        ...

    def export(self, path: str, tokenizer: str) -> None:
        """The policy in Hugging Face format, with the tokenizer of that model."""
        ...

    def average(self, reference: str, weight: float, path: str) -> None:
        """Write (1 - weight) * reference + weight * policy in float32; see `Learner.average`."""
        ...

    def keep_weights(self) -> None:
        """Remember the weights as they are now, for `merge`."""
        ...

    def merge(self, seed: int) -> None:
        """What `training.online_merging` says; see `Learner.merge`."""
        ...

    def open_sync(self, transport: TransportConfig, meeting: Meeting, replicas: Replicas) -> None:
        """Open the sending half and meet the replicas."""
        ...

    def send_weights(self, version: int, path: str | None, model: str) -> None:
        """Send everything of "policy", or of the saved model at this path, to everyone; see `Sender.send`."""
        ...

    def parameter_names(self) -> list[str]:
        """Names on the wire, in order."""
        ...

    def wire_bytes(self) -> int:
        """Size of one full transfer."""
        ...

    def digests(self, names: Sequence[str], model: str) -> dict[str, str]:
        """Checksums of these tensors of "policy" or a saved model as this learner holds them, in the wire dtype."""
        ...

    def offload(self, what: str) -> None:
        """Move to host memory and give the device's back: "optimizer" is all but the policy's weights, "all" is all."""
        ...

    def reload(self) -> None:
        """Take the device's memory back and put everything where it was."""
        ...

    def shutdown(self) -> None:
        """Leave the process group."""
        ...


class LearnerConfig(Component):
    """A learner as it is configured: the keys that every learner has, and how this one is checked and started.

    One that runs on the cluster says how a process of its own becomes a rank; see `InProcessLearner` for the others.
    """

    name: str = ""
    ranks: int = Field(1, ge=1)
    """Processes that train data-parallel: one GPU each, or cores on CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights as they compute; the optimizer keeps them and its moments in fp32. `auto`: see engine.dtype."""
    tokens_per_microbatch: Resumable[int] = Field(4096, ge=1)
    """Prompt and response tokens of one forward pass of one rank; a single longer item goes alone."""
    padding_free: Resumable[bool] = False
    """Lay the sequences of a micro-batch one after the other in one row, instead of padding them to one length: nothing is computed for
    padding, and `tokens_per_microbatch` counts tokens alone. The same numbers up to rounding. Of model families where that is known to be
    exact; with `flash_attention_2` and `sdpa` it saves most."""
    gradient_checkpointing: Resumable[bool] = False
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; off by default, and only of learners that have it (`adapts`)."""
    cpus: Resumable[int] = Field(1, ge=0)
    """CPUs reserved per rank."""
    threads: Resumable[int | None] = Field(None, ge=1)
    """Threads per CPU rank; the cores divided by the ranks by default."""
    resources: Resumable[CustomResources] = Field(default_factory=dict)
    """Extra Ray resources per rank, e.g. {learner_node: 1} to choose a node."""
    start_timeout_s: Resumable[Seconds] = 900
    """Longest start: meeting of the ranks, and loading the model."""
    step_timeout_s: Resumable[Seconds] = 3600
    """Longest single call to the learner, and longest wait of one rank for the others. One that says nothing for longer counts as lost."""

    merges: ClassVar[bool] = False
    """Whether it has `keep_weights` and `merge`, for `training.online_merging`."""
    balances_experts: ClassVar[bool] = False
    """Whether it adds the auxiliary loss of routers, `training.aux_loss_coef`."""
    adapts: ClassVar[bool] = False
    """Whether it trains adapters, `lora`; its `memory` then takes how many parameters they have."""
    samples_mixtures: ClassVar[bool] = False
    """Whether it has `sample_mixture`, for algorithms that ask for such responses."""
    trains_rewards: ClassVar[bool] = False
    """Whether it trains a reward model where an objective asks for one (`Needs.reward_head`), and has `rewards`."""
    in_process: ClassVar[bool] = False
    """Whether it runs in the controller's own process; the engine then must, too."""

    @property
    def layout(self) -> str:
        """In a word or two, how ranks share the work."""
        return self.dtype

    def check(self) -> None:
        """Refuse what is known to compute wrongly as installed here: before a run starts, and once more where each rank runs.

        Raises:
            ConfigError: naming field, cause and fix.
        """

    def memory(self, parameters: float, *, critic: float = 0, adapters: float | None = None) -> Mapping[str, float]:
        """Bytes that one rank holds when it holds most, without activations, by what they are for.

        Args:
            parameters: of the model.
            critic: parameters of a second network that is trained beside it.
            adapters: parameters of the adapters of both, which alone are trained; None trains all. Given only to learners that adapt.
        """
        return {}

    def environment(self, device: str, threads: int) -> dict[str, str]:
        """Environment variables that a rank's process must start with."""
        raise NotImplementedError

    def rank(self, settings: RankSettings, *, rank: int, store: torch.distributed.TCPStore, address: str) -> LearnerRank:
        """Make this process a rank (`learners._rank.Rank`); returns once it has loaded the model.

        Args:
            settings: the same for all ranks.
            rank: of this process.
            store, address: where the ranks meet; rank 0 hosts the store.
        """
        raise NotImplementedError


class InProcessLearner(LearnerConfig):
    """A learner that runs in the controller's own process."""

    in_process: ClassVar[bool] = True

    def open(self, vocabulary: int, algorithm: Algorithm, base: str, temperature: float) -> Learner:
        """What trains.

        Args:
            vocabulary: number of tokens.
            algorithm: whose loss is minimised.
            base: the base model.
            temperature: at which the loss takes log-probs.
        """
        raise NotImplementedError

    def connect(self, learner: Learner, engine: RolloutEngine) -> WeightSync:
        """What carries the weights of this learner, which it has opened, into an engine beside it.

        Raises:
            ConfigError: if the engine cannot take them.
        """
        raise NotImplementedError
