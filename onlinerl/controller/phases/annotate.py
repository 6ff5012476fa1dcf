"""The log-probs and values that a loss reads beside the policy's own: each is computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onlinerl.controller import items
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Answer, Iteration
from onlinerl.controller.parts import batched
from onlinerl.stores.rows import LOGPROBS, logprob_row
from onlinerl.types import Group, Judged, TrainSequence, Verdict

AT_ONCE = 1024
"""Prompts scored in one go. More at once would only take memory."""
STREAMED = 32
"""The same while the engine still samples: few enough to begin early, enough to fill the learner's micro-batches."""


def annotate(it: Iteration) -> dict[str, Any]:
    """Score what will be trained on, in the order of the prompts, whatever arrived first."""
    store = it.parts.store
    done = {row["prompt_id"] for row in store.read(it.number, LOGPROBS)}
    total = len(it.prompts()[0])
    it.parts.tracker.phase_started(it.number, "annotate", total, "groups")
    scored = 0
    labelled = it.labelled()
    for chunk in _chunks(it, labelled):
        # A group without a verdict gets no row: a resume may ask the oracle again, and then it has something to score.
        todo = [(g, answer) for g, answer in chunk if g.prompt.id not in done and isinstance(answer, Verdict)]
        sequences = [_sequences(it, group, answer) for group, answer in todo]
        arrays = _arrays(it, [s for group in sequences for s in group])
        rows, start = [], 0
        for (group, _), own in zip(todo, sequences, strict=True):
            rows.append(logprob_row(group.prompt.id, {k: v[start : start + len(own)] for k, v in arrays.items()}))
            start += len(own)
        store.append(it.number, LOGPROBS, rows)
        scored += start
        it.parts.tracker.phase_advanced(it.number, "annotate", len(chunk))
        it.check_stop()
    store.seal(it.number, LOGPROBS)
    return {"sequences": scored, "reference": it.reference(), "waited": labelled.waited}


def _chunks(it: Iteration, feed: Feed[tuple[Group, Answer]]) -> Iterator[list[tuple[Group, Answer]]]:
    """All groups with what is known about them, in the order of the prompts; each chunk as soon as it is complete."""
    arrived: dict[str, tuple[Group, Answer]] = {}
    prompts, _ = it.prompts()
    for chunk in batched(prompts, STREAMED if it.parts.config.schedule.stream else AT_ONCE):
        while not all(prompt.id in arrived for prompt in chunk):
            arrived.update({group.prompt.id: (group, answer) for group, answer in feed.take(len(prompts))})
        yield [arrived.pop(prompt.id) for prompt in chunk]
    feed.take(1)  # the end: nobody is done before the one that is followed


def _sequences(it: Iteration, group: Group, answer: Answer) -> list[TrainSequence]:
    """The responses that a group gives to train on, in the order of its items."""
    if not isinstance(answer, Verdict):
        return []
    return [s for item in items.of_group(it, Judged(group=group, verdict=answer)).items for s in item.sequences]


def _arrays(it: Iteration, sequences: Sequence[TrainSequence]) -> dict[str, list[Any]]:
    """What the algorithm asks for, one array per sequence each."""
    if not sequences:
        return {}
    needs, learner = it.parts.algorithm.needs, it.parts.learner
    temperature = needs.temperature(it.parts.config.sampling.temperature)
    arrays: dict[str, list[Any]] = {}
    reference = it.reference()
    model = None if reference is None else it.model_of(reference)
    if needs.old or model == "policy":
        arrays["old"] = learner.score(sequences, model="policy", temperature=temperature)
    if model is not None:
        same = model == "policy"
        arrays["reference"] = arrays["old"] if same else learner.score(sequences, model=model, temperature=temperature)
    if needs.values:
        arrays["values"] = learner.values(sequences)
    return arrays
