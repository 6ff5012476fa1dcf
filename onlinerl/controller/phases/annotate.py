"""The log-probs and values that a loss reads beside the policy's own: each is computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onlinerl.controller import items
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import batched
from onlinerl.protocols.store import LOGPROBS
from onlinerl.types import AnnotateRecord, Group, Judged, LogProbs, TrainSequence, Verdict

AT_ONCE = 1024
"""Prompts whose responses get their log-probs in one go. More at once would only take memory. With another number the learner makes other
micro-batches, and log-probs differ in their last digits: a run that is resumed would not be the same bit for bit."""
STREAMED = 32
"""The same with `schedule.stream`: few enough to begin while the engine still samples, enough to fill the learner's micro-batches."""


def annotate(it: Iteration) -> AnnotateRecord:
    """Log-probs of what will be trained on, in the order of the prompts, whatever arrived first."""
    table = it.parts.store.logprobs(it.number, LOGPROBS)
    it.parts.tracker.phase_started(it.number, "annotate", len(it.prompt_ids), "groups")
    count = 0
    labelled = it.labelled()
    for chunk in _chunks(it, labelled):
        # A group without a verdict gets no row: a resume may ask the oracle again, and then it has something to train on.
        sequences = {
            group.prompt.id: _sequences(it, group, answer)
            for group, answer in it.judged(table.missing(chunk))
            if isinstance(answer, Verdict)
        }
        arrays = _arrays(it, [s for own in sequences.values() for s in own])
        values, start = [], 0
        for prompt_id, own in sequences.items():
            of_prompt = {name: tuple(array[start : start + len(own)]) for name, array in arrays.items()}
            values.append(LogProbs(prompt_id=prompt_id, arrays=of_prompt))
            start += len(own)
        table.append(values)
        count += start
        it.parts.tracker.phase_advanced(it.number, "annotate", len(chunk))
        it.check_stop()
    table.seal()
    return {"sequences": count, "reference": it.reference(), "waited": labelled.waited}


def _chunks(it: Iteration, feed: Feed[str]) -> Iterator[Sequence[str]]:
    """All prompts, in their order; each chunk as soon as everything about it is known."""
    arrived: set[str] = set()
    for chunk in batched(it.prompt_ids, STREAMED if it.parts.config.schedule.stream else AT_ONCE):
        while not arrived.issuperset(chunk):
            arrived.update(feed.take(len(it.prompt_ids)))
        yield chunk
    feed.take(1)  # the end: nobody is done before the one that is followed


def _sequences(it: Iteration, group: Group, verdict: Verdict) -> list[TrainSequence]:
    """The responses that a group gives to train on, in the order of its items."""
    return [s for item in items.of_group(it, Judged(group=group, verdict=verdict)).items for s in item.sequences]


def _arrays(it: Iteration, sequences: Sequence[TrainSequence]) -> dict[str, list[Any]]:
    """What the algorithm asks for, one array per sequence each."""
    if not sequences:
        return {}
    needs, learner = it.needs, it.parts.learner
    temperature = needs.temperature(it.parts.config.sampling.temperature)
    reference = it.reference()
    model = None if reference is None else it.model_of(reference)
    models = {
        "old_logprobs": "policy" if needs.old_logprobs or model == "policy" else None,
        "reference_logprobs": model,
        "anchor_logprobs": it.model_of(0) if needs.anchor else None,
    }
    # Two that are the same model are asked for once.
    said = {
        asked: learner.logprobs(sequences, model=asked, temperature=temperature)
        for asked in dict.fromkeys(filter(None, models.values()))
    }
    arrays: dict[str, list[Any]] = {name: said[asked] for name, asked in models.items() if asked is not None}
    if needs.values:
        arrays["values"] = learner.values(sequences)
    return arrays
