"""Items of earlier iterations that are trained once more: which they are, and what the present reference says of them.

Source: "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences" (arXiv 2404.03715), section 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import NamedTuple

from onlinerl.controller import items as built_items
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import Built, batched
from onlinerl.errors import StoreError
from onlinerl.protocols.store import REPLAY_LOGPROBS
from onlinerl.types import LogProbs, TrainItem, derive_seed

Score = Callable[[Sequence[built_items.GroupItems]], Sequence[LogProbs]]
"""What the learner says of the items of some groups, one row for each group."""
AT_ONCE = 256
"""Items whose log-probs are asked for in one go."""


class Chosen(NamedTuple):
    """One item of an earlier iteration."""

    iteration: int
    prompt_id: str
    place: int
    """Among the items of its group."""

    @property
    def key(self) -> str:
        """By which its row is found."""
        return f"{self.iteration}/{self.prompt_id}/{self.place}"


def joined(it: Iteration, built: Built, score: Score | None = None) -> Built:
    """With items of earlier iterations behind the new ones, if the algorithm asks for them.

    They are drawn from all that an iteration gave, by the run's seed; each is the same as when it was new, but for what log-probs say.

    Args:
        it: the iteration that is going to train.
        built: its own items.
        score: asks the learner for what is not on disk yet; None: all is.

    Raises:
        StoreError: if something is not there that must be.
    """
    chosen = [one for age, share in enumerate(it.needs.replay, start=1) for one in draw(it, age, int(share * len(built.items)))]
    table = it.parts.store.logprobs(it.number, REPLAY_LOGPROBS)
    if not chosen:
        return built
    for chunk in batched(chosen, AT_ONCE) if score is not None and not table.sealed else ():
        missing = {*table.missing([one.key for one in chunk])}
        new = [_bare(it, one) for one in chunk if one.key in missing]
        table.append(list(score(new)) if new and score is not None else [])
        it.check_stop()
    if score is not None:
        table.seal()
    made = it.scratch.keep(_filled(it, chosen))
    sequences = [s for item in made for s in item.sequences if s.policy_version is not None]
    versions = Counter(
        s.policy_version for s in sequences if s.source not in ("reference", "carried") and s.policy_version is not None
    )
    return replace(
        built,
        items=it.scratch.keep(chain(built.items, made)),
        sampled_by=Counter(built.sampled_by) + versions,
        replayed={
            age: sum(it.number - one.iteration == age for one in chosen)
            for age in sorted({it.number - c.iteration for c in chosen})
        },
    )


def draw(it: Iteration, age: int, most: int) -> list[Chosen]:
    """At most so many items of the iteration `age` before this one, in their order there."""
    number = it.number - age
    if number < 1 or most < 1:
        return []
    found = [
        Chosen(number, made.prompt_id, place)
        for made in _groups(it, number, earlier(it, number).prompt_ids)
        for place in range(len(made.items))
    ]
    seed = it.parts.config.seed
    ranked = sorted(range(len(found)), key=lambda n: (derive_seed(seed, "replay", it.number, found[n].key), n))
    return [found[n] for n in sorted(ranked[:most])]


def earlier(it: Iteration, number: int) -> Iteration:
    """Another iteration of the run, to read its tables."""
    return Iteration(it.parts, number, it.weights, it.report, it.stop)


def _groups(it: Iteration, number: int, prompt_ids: Sequence[str]) -> Iterator[built_items.GroupItems]:
    """What the groups of an earlier iteration give, read one after the other."""
    then = earlier(it, number)
    for some in batched(prompt_ids, built_items.AT_ONCE):
        yield from (built_items.of_group(then, group, answer) for group, answer in then.judged(some))


def _bare(it: Iteration, one: Chosen) -> built_items.GroupItems:
    """The item by itself, under its own key."""
    (made,) = _groups(it, one.iteration, [one.prompt_id])
    return replace(made, prompt_id=one.key, items=[made.items[one.place]])


def _filled(it: Iteration, chosen: Sequence[Chosen]) -> Iterator[TrainItem]:
    """Every item with its log-probs."""
    table = it.parts.store.logprobs(it.number, REPLAY_LOGPROBS)
    for number, ones in groupby(chosen, key=lambda one: one.iteration):
        for some in batched(list(ones), built_items.AT_ONCE):
            prompt_ids = list(dict.fromkeys(one.prompt_id for one in some))
            groups = dict(zip(prompt_ids, _groups(it, number, prompt_ids), strict=True))
            for one, known in zip(some, table.select([one.key for one in some]), strict=True):
                made = groups[one.prompt_id]
                if made.judged is None or known is None:
                    raise StoreError(
                        f"an item of iteration {number} that is to be trained once more has no log-probs",
                        field=REPLAY_LOGPROBS,
                        fix=f"remove iteration {it.number} and all later ones from the run, then resume",
                    )
                yield from built_items.annotated(made.judged, [made.items[one.place]], known, number)
