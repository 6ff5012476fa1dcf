"""From judged groups to what is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from onlinerl import users_code
from onlinerl.controller import health
from onlinerl.controller.iteration import Answer, Iteration
from onlinerl.controller.parts import Built, batched
from onlinerl.errors import StoreError
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.protocols.store import LOGPROBS
from onlinerl.types import Group, Judged, LogProbs, Pair, TrainedPair, TrainItem, TrainSequence, Verdict

AT_ONCE = 64
"""Pairs that are written together, and prompts that are read together."""


@dataclass(frozen=True, kw_only=True)
class GroupItems:
    """What one group gives."""

    prompt_id: str
    judged: Judged | None = None
    """None if it was not judged."""
    items: Sequence[TrainItem] = ()
    pairs: Sequence[Pair] = ()
    """Those that are trained on."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """What was left out, by reason: the group (`few_samples`, `not_judged`, `no_component`), candidate pairs (the pair builder's reasons), items (the
    algorithm's, and `truncated`)."""
    contradicted: int = 0
    """Pairs whose winner lost the direct comparison with its own loser; they are trained all the same."""
    truncated: int = 0
    """Items with a response that hit max_new_tokens, kept or dropped."""

    @property
    def sequences(self) -> list[TrainSequence]:
        """Of all items, in their order."""
        return [sequence for item in self.items for sequence in item.sequences]


def of_group(it: Iteration, group: Group, answer: Answer) -> GroupItems:
    """The same at every call: pairs and items depend on the group and its verdict only."""
    if not it.large_enough(group):
        return GroupItems(prompt_id=group.prompt.id, dropped={"few_samples": 1})
    if not isinstance(answer, Verdict):  # a failure is left out, never turned into a score
        return GroupItems(prompt_id=group.prompt.id, dropped={"not_judged": 1})
    if not set(it.needs.components) <= set(answer.components or ()):  # nor is a score that was not given
        return GroupItems(prompt_id=group.prompt.id, dropped={"no_component": 1})
    judged = Judged(group=group, verdict=answer)
    health.require_asked_for(group, {"policy", *it.needs.beside_samples})
    dropped: Counter[str] = Counter()
    pairs: Sequence[Pair] = []
    if it.needs.pairs:
        pairs, reasons = it.parts.pairing.pairs(judged)
        dropped.update(reasons)
    contradicted = sum(pair.prob < 0.5 for pair in pairs)
    items, left_out = _items(it, judged, pairs)
    dropped.update(left_out)
    whole = [i for i in items if all(s.finish_reason != "length" for s in i.compared)]
    truncated = len(items) - len(whole)
    if it.parts.config.training.on_truncated == "drop":
        dropped["truncated"] += truncated
        items = whole
        pairs = [pair for pair in pairs if not judged.is_cut(pair)]
        pairs = pairs if items else []  # an item may have a third response, which was cut
    return GroupItems(
        prompt_id=group.prompt.id,
        judged=judged,
        items=items,
        pairs=pairs,
        dropped=dropped,
        contradicted=contradicted,
        truncated=truncated,
    )


def _items(it: Iteration, judged: Judged, pairs: Sequence[Pair]) -> tuple[Sequence[TrainItem], Mapping[str, int]]:
    """What the algorithm makes of the group.

    Raises:
        LearnerError: if it fails, or returns something else.
    """
    algorithm = it.parts.algorithm
    with users_code.calling(algorithm, "items", f" for prompt {judged.group.prompt.id!r}"):
        made: Any = algorithm.items(judged, pairs)
    wanted = "(list of TrainItem, {reason: number of items left out})"
    if not (isinstance(made, tuple) and len(made) == 2):
        raise users_code.wrong_result(algorithm, "items", f"a value of type {type(made).__name__}", wanted)
    items, left_out = made
    if not (isinstance(items, Sequence) and all(isinstance(i, TrainItem) and i.sequences for i in items)):
        raise users_code.wrong_result(algorithm, "items", "something else than TrainItems with sequences", wanted)
    if not (isinstance(left_out, Mapping) and all(isinstance(n, int) for n in left_out.values())):
        raise users_code.wrong_result(algorithm, "items", f"{type(left_out).__name__} {left_out!r:.80} as second part", wanted)
    return items, left_out


Annotated = tuple[GroupItems, LogProbs | None]
"""What a group gives, and what is kept about its sequences."""


def stored(it: Iteration) -> Iterator[Annotated]:
    """Every group in the order of the prompts, from the tables."""
    table = it.parts.store.logprobs(it.number, LOGPROBS)
    for prompt_ids in batched(it.prompt_ids, AT_ONCE):
        for (group, answer), known in zip(it.judged(prompt_ids), table.select(prompt_ids), strict=True):
            yield of_group(it, group, answer), known


def build(it: Iteration, groups: Iterable[Annotated]) -> Built:
    """What is trained, in the order of the prompts, and what was left out and why. The pairs are stored; the items wait on the disk."""
    made = _Made(it)
    items = it.scratch.keep(made.items(groups))
    return Built(
        items=items,
        spreads=made.spreads,
        earned=made.earned,
        sampled_by=made.sampled_by,
        dropped=+made.dropped,
        contradicted=made.contradicted,
        truncated=made.truncated,
        useful=made.useful,
        groups=len(it.prompt_ids),
    )


def selected(it: Iteration, built: Built) -> Built:
    """Without what the algorithm leaves out now that everything is known about all items.

    Raises:
        LearnerError: if it fails, or returns something else.
    """
    algorithm = it.parts.algorithm
    with users_code.calling(algorithm, "select"):
        made: Any = algorithm.select(built.items)
        places, left_out = made
        kept = list(places)
    if kept == list(range(len(built.items))) and not left_out:
        return built
    if kept != sorted({*kept} & {*range(len(built.items))}):
        wanted = f"some of the places from 0 to {len(built.items) - 1}, each once, ascending"
        raise users_code.wrong_result(algorithm, "select", f"{kept!r:.80}", wanted)
    dropped = +(Counter(built.dropped) + Counter(left_out))
    items = it.scratch.keep(built.items[place] for place in kept)
    ages = Counter(it.number - item.iteration for item in items) if built.replayed else Counter()
    return replace(built, items=items, dropped=dropped, replayed={age: ages[age] for age in built.replayed})


class _Made:
    """Gathers the items of an iteration, one group after the other, and counts."""

    def __init__(self, it: Iteration) -> None:
        self._it = it
        self.dropped = Counter({"few_samples": 0, "not_judged": 0})
        self.sampled_by = Counter[int]()
        self.spreads: list[float] = []
        self.earned: list[float] = []
        self.truncated = self.useful = self.contradicted = 0

    def items(self, groups: Iterable[Annotated]) -> Iterator[TrainItem]:
        """Once. The pairs are stored on the way."""
        table = self._it.parts.store.pairs(self._it.number)
        is_open = not table.sealed
        if is_open:
            table.clear()
        stored = False
        pairs: list[TrainedPair] = []
        for made, known in groups:
            yield from self._of_group(made, known)
            if is_open and made.judged is not None:
                pairs.extend(_trained(made.judged, pair) for pair in made.pairs)
            if len(pairs) >= AT_ONCE:
                table.append(pairs)
                stored, pairs = True, []
        table.append(pairs)
        if pairs or stored:
            table.seal()

    def _of_group(self, made: GroupItems, known: LogProbs | None) -> Iterator[TrainItem]:
        for reason, count in made.dropped.items():
            self.dropped[reason] += count
        if made.judged is None:
            return
        self.spreads.append(health.spread(made.judged.verdict, self._it.needs.components))
        self.contradicted += made.contradicted
        self.truncated += made.truncated
        self.useful += bool(made.items)
        sampled_in = self._it.reused.get(made.prompt_id, self._it.number)
        for item in annotated(made.judged, made.items, known, sampled_in):
            for sequence in item.sequences:
                if sequence.policy_version is None:  # nobody sampled it
                    continue
                self.earned.append(_score(self._it.parts.algorithm, sequence))
                if sequence.source not in ("reference", "carried"):
                    self.sampled_by[sequence.policy_version] += 1
            yield item


def _score(algorithm: Algorithm, sequence: TrainSequence) -> float:
    with users_code.calling(algorithm, "score"):
        score: object = algorithm.score(sequence)
    if not isinstance(score, Real):
        raise users_code.wrong_result(algorithm, "score", f"a value of type {type(score).__name__}", "a number")
    return float(score)


def _trained(judged: Judged, pair: Pair) -> TrainedPair:
    chosen, rejected = (judged.group.rollouts[i] for i in (pair.chosen, pair.rejected))
    return TrainedPair(
        prompt_id=judged.group.prompt.id,
        pair=pair,
        chosen_text=chosen.text,
        rejected_text=rejected.text,
        policy_version=chosen.policy_version,
    )


def annotated(judged: Judged, made: Sequence[TrainItem], kept: LogProbs | None, iteration: int) -> list[TrainItem]:
    """The items of a group with who judged them, of which iteration they are, and what was kept about their sequences.

    Raises:
        StoreError: if nothing was kept, or it was kept about others.
    """
    arrays: Mapping[str, Sequence[Any]] = {} if kept is None else kept.arrays
    lengths = [len(s.response_ids) for item in made for s in item.sequences]
    own_lengths = {"ches": [2 * first for item in made for first in [1, *[0] * (len(item.sequences) - 1)]]}
    if kept is None or any([len(a) for a in own] != own_lengths.get(name, lengths) for name, own in arrays.items()):
        raise StoreError(
            f"the log-probs that are stored for prompt {judged.group.prompt.id!r} are not those of its items",
            field="logprobs",
            fix="remove logprobs.parquet of this iteration and resume with the version of onlinerl that began it",
        )
    filled = iter(
        [
            s.with_(**{name: own[i] for name, own in arrays.items()})
            for i, s in enumerate(s for item in made for s in item.sequences)
        ]
    )
    by = judged.verdict.annotator
    return [
        replace(item, sequences=tuple(next(filled) for _ in item.sequences), annotator=by, iteration=iteration) for item in made
    ]
