"""The role of stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from onlinerl.types import Group, Label, LogProbs, PhaseRecord, PhaseRecords, Prompt, Selected, TrainedPair

Kind = Literal["checkpoints", "auxiliary", "exports", "references"]
"""What an iteration keeps beside its tables: the state of the learner that holds the policy, of one that holds auxiliary weights, the policy,
and with `reference.schedule: ema` the average of iterates that is the reference."""


T = TypeVar("T")
V = TypeVar("V")

SELECTION = "selection"
ROLLOUTS = "rollouts"
REFERENCE_ROLLOUTS = "reference_rollouts"
MIXTURE_ROLLOUTS = "mixture_rollouts"
VERDICTS = "verdicts"
LOGPROBS = "logprobs"
"""What is known about the responses that are trained on, f32[T] each, by name (old_logprobs, reference_logprobs, anchor_logprobs, values), and
of the chosen responses of pairs f32[2] (ches)."""
REPLAY_LOGPROBS = "replay_logprobs"
"""The same about the items of earlier iterations that are trained once more: one row for each."""
PAIRS = "pairs"
EVALUATION = "evaluation"
EVALUATION_VERDICTS = "evaluation_verdicts"
ANCHORS = "anchors"
"""Of iteration 0: pairs whose better response is known."""
ANCHOR_VERDICTS = "anchor_verdicts"
REFRESH_LABELS = "refresh_labels"
"""What the oracle says of responses that a reward model learns from between iterations."""
REFRESHED_VERDICTS = "refreshed_verdicts"
"""What the new version of the oracle says of the answers to the held-out prompts that the one before it has judged in `measure`."""
BASE_LOGPROBS = "base_logprobs"
"""Of iteration 0: the learner's log-probs of the base model's own answers, f32[T] each, for the forward KL of later iterates."""


class Table(Protocol[T]):
    """Values of one kind, at most one part of them in memory at a time. Any thread may call it; only the controller writes."""

    @property
    def sealed(self) -> bool:
        """True once the table is complete."""
        ...

    def append(self, values: Sequence[T]) -> None:
        """Durable when it returns; if it raises, none of the values is in the table."""
        ...

    def __iter__(self) -> Iterator[T]:
        """All values, in the order of `append`."""
        ...

    def select(self, prompt_ids: Iterable[str]) -> Iterator[T | None]:
        """The latest value of each prompt, None where there is none."""
        ...

    def missing(self, prompt_ids: Iterable[str]) -> list[str]:
        """Prompts of which there is nothing, in the same order."""
        ...

    def seal(self) -> None:
        """The table is complete. May be called again."""
        ...

    def clear(self) -> None:
        """Begin again: what a killed process left is removed. A complete table refuses."""
        ...


class Ledger(Protocol):
    """What is judged already, by what was asked. Any thread may call it."""

    def find(self, key: str) -> Label | None:
        """The label of a question (`label_key`), at no cost; None if it is not known."""
        ...

    def add(self, iteration: int, table: str, labels: Iterable[Label]) -> None:
        """What has just been written to a table."""
        ...

    def look_again(self) -> None:
        """See what other runs have written meanwhile."""
        ...


class Scratch(Protocol):
    """Values on the disk, of no use to anybody after this process."""

    def keep(self, values: Iterable[V]) -> Sequence[V]:
        """The same values in the same order, each of them read when it is asked for."""
        ...


class Store(Protocol):
    """The run directory: everything that resume needs. Only the controller writes to it."""

    def groups(self, iteration: int, table: str, prompts: Mapping[str, Prompt] | None) -> Table[Group]:
        """Responses, to these prompts by their ids; without them, a prompt is what its row says of it."""
        ...

    def labels(self, iteration: int, table: str) -> Table[Label]:
        """What an oracle said."""
        ...

    def logprobs(self, iteration: int, table: str) -> Table[LogProbs]:
        """What a learner said."""
        ...

    def pairs(self, iteration: int) -> Table[TrainedPair]:
        """What was trained on, where that is pairs."""
        ...

    def selection(self, iteration: int) -> Table[Selected]:
        """The prompts that a selector chose, in their order."""
        ...

    def scratch(self) -> AbstractContextManager[Scratch]:
        """Room on the disk for what the memory has no room for, as long as the block lasts."""
        ...

    def finish_phase(self, iteration: int, phase: str, record: PhaseRecord) -> None:
        """Mark a phase of an iteration as done, with what later phases and `show` need to know about it."""
        ...

    def phases(self, iteration: int) -> PhaseRecords:
        """Finished phases of an iteration and their records, in the order in which they finished."""
        ...

    def staged(self, kind: Kind, iteration: int) -> AbstractContextManager[Path]:
        """A directory that becomes the artefact when the block ends."""
        ...

    def require_files(self, path: Path, written: Mapping[str, int]) -> None:
        """Refuse a staged artefact that lacks anything of what was written to it."""
        ...

    def require(self, kind: Kind, iteration: int) -> Path:
        """The complete artefact of an iteration, every byte of it verified."""
        ...

    def retain(self, kind: Kind, keep: set[int]) -> None:
        """Remove those of all other iterations."""
        ...

    def require_free(self, bytes_needed: int, min_free_bytes: int) -> None:
        """Refuse to write what would leave less than this free."""
        ...
