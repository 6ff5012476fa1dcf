"""Steps of responses -> what is trained. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum
from typing import TYPE_CHECKING

from onlinerl.ops.items import train_sequences

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged, Step
    from onlinerl.types.training import TrainSequence


def step_sequence(judged: Judged, step: Step) -> TrainSequence | None:
    """A step as a sequence of its own, whose context is the prompt and all tokens before it: these have no part in the loss, and none in lengths.

    Score, win rate and other scores are the means over the responses that begin so; what one of them is worth says little of how it begins. None
    if one of them was not judged.
    """
    found = train_sequences(judged, step.leaves)
    if len(found) < len(step.leaves):
        return None
    leaf = found[step.leaves[0]]
    before = max(0, step.start - leaf.prefix)  # of the tokens that were sampled
    after = step.end - leaf.prefix
    shared = tuple(map(int, leaf.response_ids[:before]))
    logprobs = leaf.behavior_logprobs
    return leaf.with_(
        prompt_ids=(*leaf.prompt_ids, *shared),
        prefix=leaf.prefix + before,
        response_ids=leaf.response_ids[before:after],
        behavior_logprobs=None if logprobs is None else logprobs[before:after],
        score=_mean(one.score for one in found.values()),
        win_rate=_mean(one.win_rate for one in found.values()),
        components={name: _mean(one.components[name] for one in found.values()) for name in leaf.components},
        finish_reason=leaf.finish_reason if len(found) == 1 else "stop",
    )


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return fsum(known) / len(known)
