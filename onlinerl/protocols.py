"""The roles. Each plural folder holds implementations of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from onlinerl.errors import OracleError
from onlinerl.types import (
    Failure,
    Group,
    Judged,
    Metric,
    Pair,
    Prompt,
    Query,
    Request,
    Sampling,
    SyncReport,
    TrainItem,
    TrainSequence,
    Unit,
    UpdateReport,
    Verdict,
)

if TYPE_CHECKING:  # torch stays out of everything that only passes batches along
    from onlinerl.batch import Batch, LossOutput, Outputs


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in ("CPU", "GPU"):  # would take the place of what the run reserves for itself
            raise ValueError(f"{name} is no custom resource; the key `cpus` and the layout say how many there are")
        if amount < 0:
            raise ValueError(f"{name} cannot be negative")
    return resources


CustomResources = Annotated[dict[str, float], AfterValidator(_custom)]
"""Amounts of Ray's custom resources, by name."""


Seconds = Annotated[float, Field(gt=0, le=1e6)]
"""A deadline. Eleven days are longer than any wait should be, and short enough for every timer that is set to it."""


class Component(BaseModel):
    """Base of everything that a configuration selects by name: its fields are its knobs, an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Needs(BaseModel):
    """What an algorithm must be given; the controller computes nothing that nobody asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: bool = False
    """Pairs built by the configured pair builder."""
    reference: bool = False
    """Reference log-probs."""
    old: bool = False
    """Log-probs of the learner's own weights before the first step."""
    values: bool = False
    """A critic."""
    entropy: bool = False
    min_samples: int = 1
    """Fewest responses per prompt that make sense."""
    preferences: bool = False
    """How probable it is that one response beats another (win rates, soft labels); scores alone only imply it."""
    kl_in_reward: bool = False
    """The reference acts only through `old` against `reference` log-probs, so only where the two are different weights."""
    critic_warmup: int = 0
    """Iterations at the start in which the policy does not learn."""


class Algorithm(Component):
    """An algorithm is its hyper-parameters plus a pure loss. It is stateless and frozen: the configuration is the algorithm.

    Subclasses set the class attributes and implement `items` and `loss`; `prepare` is optional.
    """

    def needs(self) -> Needs:
        """What must be computed before `loss` can run."""
        raise NotImplementedError

    @property
    def unit(self) -> Unit:
        """What the summed loss is divided by the global count of."""
        raise NotImplementedError

    @property
    def default_reference(self) -> Literal["fixed", "previous", "none"]:
        """The reference schedule its paper uses."""
        raise NotImplementedError

    @property
    def loss_at_reference(self) -> float | None:
        """The loss per unit when policy and reference are the same, if the formula fixes it; the step-0 self-test checks it."""
        return None

    @property
    def policy_gradient(self) -> bool:
        """True if log-probs must be taken at the sampling temperature; preference losses use temperature 1."""
        return False

    def most_items(self, samples: int, pairs: int) -> int:
        """Upper bound of what `items` returns for a group of `samples` responses of which the builder makes at most `pairs`."""
        return pairs if self.needs().pairs else samples

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Mapping[str, int]]:
        """Turn one judged group into what is trained, and say how much of it was left out for which reason.

        `pairs` is empty unless `needs().pairs`.
        """
        raise NotImplementedError

    def score(self, sequence: TrainSequence) -> float:
        """What a response earns: the oracle's score, unless the algorithm puts another one in its place."""
        return sequence.score

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> list[TrainItem]:
        """See all items of the iteration at once, with log-probs and values filled in: advantages, whitening, weights.

        `past` is what `figures` said in each earlier iteration, oldest first, read from the run directory.
        """
        return list(items)

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Mapping[str, float]:
        """Finite figures of the whole iteration, from its items as `prepare` got them: reported, and kept for later iterations.

        What an algorithm must remember from one iteration to the next goes here, so that a resume remembers exactly the same.
        """
        return {}

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """The loss of one micro-batch as a sum over units."""
        raise NotImplementedError


class Oracle(Component):
    """Judges groups of responses. Configured like an algorithm; heavy state is loaded by `open`, never at import.

    One that returns preferences without scores only compares: it is never asked about a single response.
    """

    preference_temperature: float = Field(1.0, gt=0)
    """Where scores must stand in for preferences, P(i beats j) = sigmoid((s_i - s_j) / preference_temperature): Bradley-Terry. 1 suits
    a reward model, whose scores are log-odds by training; an oracle with other units needs another. Comparisons do not read it."""
    groups_per_call: int = Field(1, ge=1)
    """Groups that one call of `judge` gets. A call that fails is asked again as a whole: keep it at 1 where answers cost money."""
    call_timeout_s: Seconds = 120.0
    """Longest wait for the next answer of a call."""
    retries: int = Field(2, ge=0)
    """How often a call is tried again after a missed deadline, a lost connection or an HTTP status that may pass (408, 429, 5xx)."""

    def open(self) -> None:
        """Load models, open connections. Called once in the process that will judge, but not in the thread that `judge` runs in."""

    def close(self) -> None:
        """Release what `open` took."""

    @property
    def version(self) -> str:
        """Hash or name of everything that could change a verdict."""
        raise NotImplementedError

    @property
    def needs_reference_answer(self) -> bool:
        """True if prompts must carry a reference answer."""
        return False

    def judge(self, queries: Sequence[Query]) -> Iterable[Verdict | Failure]:
        """One result per query, in order: a list, or an iterator that yields each as soon as it is known.

        What an iterator has yielded is on disk before the next one is waited for, so that nothing paid for is lost. Where there is
        no judgement, the result is a Failure, which is counted. An exception becomes one too, after another try if its cause may
        pass; an OracleError stops the run.
        """
        raise NotImplementedError

    def ask(self, queries: Sequence[Query]) -> Iterator[Verdict | Failure]:
        """`judge` as the rest of the system calls it: every answer is checked before anybody believes it (R-G1).

        A Verdict with bad numbers becomes a Failure; a good one gets the temperature of this oracle.

        Raises:
            OracleError: if `judge` answers with something that is no list of Verdicts and Failures, one per query.
        """
        results, answered = self.judge(queries), 0
        if isinstance(results, Sized) and len(results) != len(queries):  # no telling which answer belongs to which query
            raise self._miscounted(len(results), len(queries))
        for answered, result in enumerate(results, start=1):
            if answered > len(queries):
                break
            if not isinstance(result, Verdict | Failure):
                raise OracleError(
                    f"{type(self).__name__} returned a {type(result).__name__}",
                    field="oracle",
                    fix="return a Verdict or a Failure (onlinerl.types) for each query",
                )
            if isinstance(result, Verdict):
                problem = result.problem(len(queries[answered - 1].responses))
                yield problem or replace(result, temperature=self.preference_temperature)
            else:
                yield result
        if answered != len(queries):
            raise self._miscounted(answered, len(queries))

    def _miscounted(self, results: int, queries: int) -> OracleError:
        return OracleError(
            f"{type(self).__name__} returned {results} results for {queries} queries",
            field="oracle",
            fix="return one result per query, in order",
        )


class ModelOracle(Oracle):
    """An oracle that loads weights. On a cluster it runs in processes of its own, for which room is reserved before anything is
    loaded; each gets an equal share of the groups."""

    replicas: int = Field(1, ge=1)
    """Processes that judge in parallel, each with a copy of the weights."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """`auto` takes a whole GPU per replica where the run uses GPUs."""
    cpus: int = Field(0, ge=0)
    """CPUs reserved per replica; 0 shares those of engine and learner, which work at other times."""
    threads: int | None = Field(None, ge=1)
    """Threads that a replica on a CPU computes with; the cores of its machine divided by the replicas by default."""
    resources: CustomResources = Field(default_factory=dict)
    """Extra Ray resources per replica, e.g. {oracle_node: 1} to choose a node."""
    start_timeout_s: Seconds = 900.0

    def inspect(self) -> None:
        """Find out what is wrong without loading the weights.

        Raises:
            OracleError: if they cannot be those of such an oracle.
        """
        raise NotImplementedError


class PairBuilder(Component):
    """Turns one judged group into pairs."""

    def most(self, samples: int) -> int:
        """Upper bound of the pairs built from `samples` responses."""
        return samples * (samples - 1) // 2

    def build(self, judged: Judged) -> tuple[list[Pair], Mapping[str, int]]:
        """Pairs, and how many candidates were dropped for which reason."""
        raise NotImplementedError


class PromptSource(Protocol):
    """Prompts with an explicit cursor: the same cursor gives the same prompts."""

    def take(self, count: int, cursor: int) -> tuple[list[Prompt], int]:
        """`count` prompts from `cursor` on, and the next cursor."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Groups in the order in which they finish."""
        ...

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Teacher-forced log-probs of (prompt, response) tokens under the engine's weights: f32[T] each."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Holds the policy and its optimizer."""

    def score(self, sequences: Sequence[TrainSequence], *, model: str, temperature: float) -> list[np.ndarray]:
        """Log-probs f32[T] of each response under `model`: "policy", or the path of a saved model."""
        ...

    def values(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]:
        """Critic values f32[T] of each response."""
        ...

    def update(self, steps: Sequence[Sequence[TrainItem]], learning_rates: Sequence[float]) -> Iterator[UpdateReport]:
        """Take one optimizer step per element of `steps`, yielding a report after each."""
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


class WeightSync(Protocol):
    """Moves the policy into every replica of the engine, and proves that it arrived."""

    def push(self, version: int) -> SyncReport:
        """Send, reset caches, prove. Returns only if everything was proved.

        Raises:
            SyncError: on any failure, with the replica's own error.
        """
        ...


class Tracker(Protocol):
    """Is told what happens. Trackers never influence the run; what one does not care about it leaves as it is."""

    def phase_started(self, iteration: int, phase: str, total: int | None, unit: str) -> None:
        """Work of `total` `unit`s begins; None if the amount is not known."""
        return

    def phase_advanced(self, iteration: int, phase: str, amount: int) -> None:
        """`amount` more is done."""
        return

    def phase_finished(self, iteration: int, phase: str, seconds: float) -> None:
        """The phase is over and on disk."""
        return

    def log(self, metrics: Iterable[Metric]) -> None:
        """Figures."""
        return

    def note(self, text: str) -> None:
        """A sentence for people."""
        return

    def ended(self, state: str) -> None:
        """The run has ended: `finished`, `failed` or `interrupted`. Nothing but `close` follows."""
        return

    def close(self) -> None:
        """Nothing more will come."""
        return


class Store(Protocol):
    """The run directory: everything that resume needs. Only the controller writes to it."""

    def append(self, iteration: int, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Durable when it returns."""
        ...

    def read(self, iteration: int, table: str) -> list[dict[str, Any]]:
        """All rows, in the order of `append`."""
        ...

    def sealed(self, iteration: int, table: str) -> bool:
        """True once the table is complete."""
        ...

    def seal(self, iteration: int, table: str) -> None:
        """The table is complete: turn its journal into one Parquet file."""
        ...

    def write(self, iteration: int, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make `rows` the complete table, all of them or none."""
        ...

    def finish_phase(self, iteration: int, phase: str, record: Mapping[str, Any]) -> None:
        """Mark a phase of an iteration as done, with what later phases and `show` need to know about it."""
        ...

    def phases(self, iteration: int) -> dict[str, dict[str, Any]]:
        """Finished phases of an iteration and their records, in the order in which they finished."""
        ...
