"""The log-probs and values that a loss reads beside the policy's own: each is computed once and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onlinerl.controller import items, replay
from onlinerl.controller.feed import Feed
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.parts import batched
from onlinerl.protocols.store import LOGPROBS, Table
from onlinerl.types import AnnotateRecord, LogProbs, TrainItem, TrainSequence

AT_ONCE = 1024
"""Prompts whose responses get their log-probs in one go. More at once would only take memory. With another number the learner makes other
micro-batches, and log-probs differ in their last digits: a run that is resumed would not be the same bit for bit."""
STREAMED = 32
"""The same with `schedule.stream`: few enough to begin while the engine still samples, enough to fill the learner's micro-batches."""


def annotate(it: Iteration) -> AnnotateRecord:
    """Log-probs of what will be trained on, in the order of the prompts, whatever arrived first."""
    table = it.parts.store.logprobs(it.number, LOGPROBS)
    it.parts.tracker.phase_started(it.number, "annotate", len(it.prompt_ids), "groups")
    annotated = Counter[str]()
    labelled = it.labelled()
    built = items.build(it, _annotated(it, table, labelled, annotated))
    table.seal()
    it.built = replay.joined(it, built, lambda groups: _of_groups(it, groups))
    return {"sequences": annotated["sequences"], "reference": it.reference(), "waited": labelled.waited}


def _annotated(
    it: Iteration, table: Table[LogProbs], labelled: Feed[str], annotated: Counter[str]
) -> Iterator[items.Annotated]:
    """Every group; what is new is on the disk before anybody gets it, and counted."""
    for chunk in _chunks(it, labelled):
        made = {group.prompt.id: items.of_group(it, group, answer) for group, answer in it.judged(chunk)}
        missing = table.missing(chunk)
        # A group without a verdict gets no row: a resume may ask the oracle again, and then it has something to train on.
        new = _of_groups(it, [made[prompt_id] for prompt_id in missing if made[prompt_id].judged is not None])
        table.append(new)
        annotated["sequences"] += sum(len(made[one.prompt_id].sequences) for one in new)
        known = {one.prompt_id: one for one in new}
        if len(missing) < len(chunk):
            known |= {one.prompt_id: one for one in table.select(chunk) if one is not None}
        yield from ((made[prompt_id], known.get(prompt_id)) for prompt_id in chunk)
        it.parts.tracker.phase_advanced(it.number, "annotate", len(chunk))
        it.check_stop()


def _of_groups(it: Iteration, groups: Sequence[items.GroupItems]) -> list[LogProbs]:
    """What is kept about the sequences of each group."""
    arrays = _arrays(it, [s for made in groups for s in made.sequences])
    if it.needs.ches:
        arrays["ches"] = _ches(it, [item for made in groups for item in made.items])
    known, start = [], 0
    for made in groups:
        end = start + len(made.sequences)
        of_prompt = {name: tuple(array[start:end]) for name, array in arrays.items()}
        known.append(LogProbs(prompt_id=made.prompt_id, arrays=of_prompt))
        start = end
    return known


def _chunks(it: Iteration, feed: Feed[str]) -> Iterator[Sequence[str]]:
    """All prompts, in their order; each chunk as soon as everything about it is known."""
    arrived: set[str] = set()
    for chunk in batched(it.prompt_ids, STREAMED if it.parts.config.schedule.stream else AT_ONCE):
        while not arrived.issuperset(chunk):
            arrived.update(feed.take(len(it.prompt_ids)))
        yield chunk
    feed.take(1)  # the end: nobody is done before the one that is followed


def _ches(it: Iteration, pairs: Sequence[TrainItem]) -> list[np.ndarray]:
    """Of each pair, one array for each of its sequences: <a, b> - |a|^2 of the hidden states of the chosen response (a) and the rejected one
    (b), of their sums and of their means; empty for the others. "Unintentional Unalignment: Likelihood Displacement in Direct Preference
    Optimization" (arXiv 2410.08847), definition 2."""
    two = [s for pair in pairs for s in pair.sequences[:2]]
    sums = [np.asarray(own, np.float64) for own in it.parts.learner.hidden_sums(two)] if two else []
    lengths = [len(s.response_ids) for s in two]
    found: list[np.ndarray] = []
    for n, pair in enumerate(pairs):
        (a, b), (T, U) = sums[2 * n : 2 * n + 2], lengths[2 * n : 2 * n + 2]
        scores = np.array([a @ b - a @ a, a @ b / (T * U) - a @ a / T**2], np.float32)
        found += [scores, *[np.zeros(0, np.float32)] * (len(pair.sequences) - 1)]
    return found


def _arrays(it: Iteration, sequences: Sequence[TrainSequence]) -> dict[str, list[Any]]:
    """What the algorithm asks for, one array per sequence each."""
    if not sequences:
        return {}
    needs, learner = it.needs, it.parts.learner
    temperature = needs.temperature(it.parts.config.sampling.temperature)
    model = it.reference_model()
    models = {
        # With auxiliary weights it is they that training starts from, and `train` asks them.
        "old_logprobs": "policy" if (it.old_logprobs and not needs.auxiliary) or model == "policy" else None,
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
