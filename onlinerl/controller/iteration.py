"""What the phases of one iteration share: its number, its prompts, what they hand to each other, and where which weights are."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from onlinerl import graph
from onlinerl.controller import health
from onlinerl.controller.feed import Feed, Loading, Stopped
from onlinerl.controller.parts import Built, Parts, reference_iteration, samples_dynamically
from onlinerl.controller.report import Reporter
from onlinerl.errors import StoreError, SyncError
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.store import MIXTURE_ROLLOUTS, REFERENCE_ROLLOUTS, ROLLOUTS, VERDICTS, Kind, Scratch, Table
from onlinerl.types import (
    Failure,
    Group,
    Label,
    Prompt,
    Request,
    SampleRecord,
    Selected,
    SyncReport,
    TrainRecord,
    Verdict,
    derive_seed,
)
from onlinerl.types.rollouts import Source

Answer = Verdict | Failure | None
"""What is known about a group once it has been dealt with; None: it was too small to be judged."""


@dataclass
class Weights:
    """Which version is where. The engine knows nothing at start, so the first push always happens."""

    learner: int = 0
    engine: int | None = None


@dataclass
class Iteration:
    """One iteration as its phases see it."""

    parts: Parts
    number: int
    weights: Weights
    report: Reporter
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the run is being stopped."""

    def __post_init__(self) -> None:
        self.rollouts: Feed[str] = Feed(self.stop)
        """Prompts of which `sample` has stored the responses so far; read them through `sampled`."""
        self.answers: Feed[str] = Feed(self.stop)
        """Prompts that `label` has dealt with so far; read them through `labelled`."""
        self.files = contextlib.ExitStack()
        """What is open for as long as this process works on the iteration, until `train` has ended."""
        self.built: Built | None = None
        """What `annotate` has left for `train`, if it went through it in this process."""

    def check_stop(self) -> None:
        """Between two things that are durable one by one.

        Raises:
            Stopped: if the run is being stopped.
        """
        if self.stop.is_set():
            raise Stopped

    def finished(self, phase: str) -> None:
        """Whoever follows a phase may come to an end."""
        if phase == "sample":
            self.rollouts.close()
        if phase == "label":
            self.answers.close()

    @cached_property
    def scratch(self) -> Scratch:
        """What is too large for memory and not worth keeping."""
        return self.files.enter_context(self.parts.store.scratch())

    @property
    def cursor(self) -> int:
        """Where the prompts of this iteration start."""
        return self.parts.store.phases(self.number - 1)["sample"]["next_cursor"] if self.number > 1 else 0

    @property
    def sampling_version(self) -> int:
        """Which weights this iteration is sampled from."""
        return graph.sampling_version(self.number, self.parts.config.schedule.max_lag)

    @cached_property
    def dynamic(self) -> bool:
        """Whether prompts whose responses are judged all alike are replaced by others."""
        return samples_dynamically(self.parts.config, self.parts.algorithm)

    @property
    def most_rounds(self) -> int:
        """How often prompts are sampled at most."""
        return self.parts.config.sampling.max_rounds if self.dynamic else 1

    def prompts(self, rounds: int = 1) -> tuple[list[Prompt], int]:
        """The prompts that are sampled in so many rounds, no prompt twice, and the cursor behind them: those that `select` has chosen, or
        the next ones in the order that they have."""
        source, count = self.parts.train_prompts, rounds * self.parts.config.prompts.per_iteration
        if self.chosen is None:
            return source.take(min(count, len(source)), self.cursor)
        taken = [self.parts.prompts_by_id[one.prompt_id] for one in self.chosen[:count]]
        return taken, self.cursor + len(taken)

    @cached_property
    def reused(self) -> Mapping[str, int]:
        """The iteration from which responses to a prompt are trained on once more, for each prompt that is not sampled because of that."""
        return {one.prompt_id: one.reused_from for one in self.chosen or () if one.reused_from is not None}

    @cached_property
    def chosen(self) -> list[Selected] | None:
        """All that `select` has chosen, in their order; None where nothing is chosen.

        Raises:
            StoreError: if it is not there.
        """
        if not self.parts.config.selection.chooses:
            return None
        table = self.parts.store.selection(self.number)
        if not table.sealed:
            raise StoreError(
                f"the prompts that were chosen for iteration {self.number} are not there",
                field="runs",
                fix="remove this iteration and all later ones from the run, then resume",
            )
        return list(table)

    @cached_property
    def prompt_ids(self) -> list[str]:
        """Of the prompts to train on, in their order: training must not depend on which response arrived first. With dynamic sampling
        they are known once `sample` is finished."""
        return list(self._sample_record["kept"]) if self.dynamic else [p.id for p in self.prompts()[0]]

    @cached_property
    def sampled_ids(self) -> list[str]:
        """Of all prompts that were sampled, in their order, once `sample` is finished."""
        asked = [p.id for p in self.prompts(self.most_rounds)[0]]
        return asked[: self._sample_record["prompts"]] if self.dynamic else asked

    @property
    def _sample_record(self) -> SampleRecord:
        return self.parts.store.phases(self.number)["sample"]

    def request(self, prompt: Prompt, places: Sequence[object], *, greedy: bool = False, source: Source = "policy") -> Request:
        """For responses to a prompt, one for each place: seeds depend on nothing but run, iteration, prompt and place."""
        config = self.parts.config
        return Request(
            prompt=prompt,
            seeds=tuple(derive_seed(config.seed, self.number, prompt.id, *_listed(place)) for place in places),
            greedy=greedy,
            source=source,
            prefix_ids=self._prefix(prompt),
        )

    def _prefix(self, prompt: Prompt) -> tuple[int, ...]:
        """What the responses to a prompt begin with: its stored answer up to a token before its end, where the algorithm asks for that."""
        config = self.parts.config
        share = self.needs.prefix
        if not share or derive_seed(config.seed, self.number, prompt.id, "reset") >= share * 2**31:
            return ()
        # Never the end of the answer, after which there is nothing to sample, and room for a token behind it.
        most = min(prompt.answer_ids.index(prompt.answer_ids[-1]), config.sampling.max_new_tokens - 1)
        return prompt.answer_ids[: 1 + derive_seed(config.seed, self.number, prompt.id, "cut") % most] if most > 0 else ()

    def groups(self) -> Table[Group]:
        """What is sampled for training."""
        return self.parts.store.groups(self.number, ROLLOUTS, self._by_id)

    def reference_groups(self) -> Table[Group]:
        """What the base model says to the same prompts, where the algorithm asks for that."""
        return self.parts.store.groups(self.number, REFERENCE_ROLLOUTS, self._by_id)

    def mixture_groups(self) -> Table[Group]:
        """What a mixture of policy and reference says to them, where the algorithm asks for that."""
        return self.parts.store.groups(self.number, MIXTURE_ROLLOUTS, self._by_id)

    @cached_property
    def needs(self) -> Needs:
        """Of the algorithm, which makes them anew whenever it is asked."""
        return self.parts.algorithm.needs

    @property
    def old_logprobs(self) -> bool:
        """Whether log-probs of the weights that training starts from are asked for: by the loss, or to see how far it has moved them."""
        return self.needs.old_logprobs or self.parts.config.training.target_kl is not None

    @cached_property
    def _by_id(self) -> dict[str, Prompt]:
        return {p.id: p for p in self.prompts(self.most_rounds)[0]}

    def labels(self) -> Table[Label]:
        """What the oracle says about it."""
        return self.parts.store.labels(self.number, VERDICTS)

    def sampled(self) -> Loading[str, Group]:
        """The groups: in the order of the prompts if all are there, else as they come."""
        all_there = "sample" in self.parts.store.phases(self.number)
        feed = Feed.of(self.sampled_ids, self.stop) if all_there else self.rollouts
        return Loading(feed, lambda ids: [group for group, _ in self.judged(ids, labelled=False)])

    def labelled(self) -> Feed[str]:
        """The prompts whose groups have been dealt with: in their order if all are, else as they come."""
        all_there = "label" in self.parts.store.phases(self.number)
        return Feed.of(self.prompt_ids, self.stop) if all_there else self.answers

    def judged(self, prompt_ids: Sequence[str], *, labelled: bool = True) -> Iterator[tuple[Group, Answer]]:
        """The group of each prompt with what is known about it, read one after the other.

        Raises:
            StoreError: if a group is not there.
        """
        labels = self.labels().select(prompt_ids) if labelled else iter([None] * len(prompt_ids))
        for prompt_id, group, label in zip(prompt_ids, self.groups().select(prompt_ids), labels, strict=True):
            if group is None:
                raise StoreError(
                    f"the responses to prompt {prompt_id!r} are not in the rollouts of iteration {self.number}",
                    field="runs",
                    fix="remove this iteration and all later ones from the run, then resume",
                )
            yield group, None if label is None else label.result

    def idle_before(self) -> int:
        """How many iterations right before this one gave nothing to learn."""
        before = self._train_record(self.number - 1)
        return 0 if before is None else before.get("idle_in_a_row", 0)

    def check_idle(self) -> None:
        """After its last phase. The last iteration ends the run anyway.

        Raises:
            OracleError: if too many iterations in a row gave nothing to learn.
        """
        record = self._train_record(self.number)
        if record is not None and 0 < self.number < self.parts.config.iterations:
            health.check_idle(record, self.parts.config.training.max_idle_iterations)

    def last_trained(self, until: int) -> int:
        """The newest iteration up to `until` that has taken an optimizer step; 0 if none has."""
        records = ((t, self._train_record(t)) for t in range(until, 0, -1))
        return next((t for t, record in records if record is not None and record.get("steps", 0)), 0)

    def _train_record(self, number: int) -> TrainRecord | None:
        return self.parts.store.phases(number).get("train")

    def large_enough(self, group: Group) -> bool:
        """Whether a group has as many usable responses as the algorithm needs."""
        return len(group.rollouts) >= self.needs.min_samples

    def reference(self, iteration: int | None = None) -> int | None:
        """Which iterate the reference of this iteration, or of another one, is, or is the newest in its average; None if the algorithm
        needs none."""
        if not self.needs.reference:
            return None
        chosen = self.parts.config.reference
        schedule = self.parts.algorithm.reference if chosen.schedule == "default" else chosen.schedule
        return reference_iteration(schedule, chosen.every, self.number if iteration is None else iteration)

    @property
    def averaged(self) -> bool:
        """Whether the reference is an average of iterates, which is kept beside them."""
        return self.needs.reference and self.parts.config.reference.schedule == "ema"

    @cached_property
    def reference_path(self) -> str | None:
        """Where the weights of the reference are on disk, compared with their checksums; None if the algorithm needs none."""
        reference = self.reference()
        if reference and self.averaged:
            return str(self.parts.store.require("references", reference))
        return None if reference is None else self.saved(reference)

    def reference_model(self) -> str | None:
        """Where the weights of the reference are: "policy" if the learner holds them, else a path; None if the algorithm needs none."""
        reference = self.reference()
        begun = self.averaged and reference != 0  # until it has taken in an iterate, an average is the base model
        return "policy" if reference == self.weights.learner and not begun else self.reference_path

    def model_of(self, iterate: int) -> str:
        """Where the weights of an iterate are: "policy" if the learner holds them, else a path."""
        return "policy" if iterate == self.weights.learner else self.saved(iterate)

    def saved(self, iterate: int) -> str:
        """Where the weights of an iterate are on disk."""
        return str(self.parts.store.require("exports", iterate)) if iterate else self.parts.base_model

    def require_free(self) -> None:
        """Refuse to write a checkpoint and an export if that would leave too little room."""
        config, store = self.parts.config, self.parts.store
        store.require_free(self.parts.state_bytes, int(config.checkpoints.min_free_gib * 2**30))

    def save(self, kind: Kind) -> None:
        """Write what the learner holds, for exact continuation."""
        with self.parts.store.staged(kind, self.number) as path:
            self.parts.store.require_files(path, self.parts.learner.save(path))

    def push(self) -> SyncReport:
        """Give the engine the learner's weights; that it failed is exported before it ends the run."""
        return push(self.parts, self.weights, self.report, self.number)

    def push_base(self) -> SyncReport:
        """Give the engine those of the base model, which is version 0, while the learner keeps its own."""
        return push(self.parts, self.weights, self.report, self.number, base=True)


def _listed(place: object) -> tuple[object, ...]:
    return place if isinstance(place, tuple) else (place,)


def push(parts: Parts, weights: Weights, report: Reporter, iteration: int, *, base: bool = False) -> SyncReport:
    """Give the engine the learner's weights, or those of the base model; that it failed is exported before it ends the run.

    Raises:
        SyncError: if it failed.
    """
    weights.engine, version = None, 0 if base else weights.learner
    try:
        pushed = parts.sync.push(version, parts.base_model if base else "policy")
    except SyncError:
        report.push_failed(iteration)
        raise
    weights.engine = version
    return pushed
