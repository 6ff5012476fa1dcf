"""The responses to one prompt, from any engine that is asked for one sample at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from onlinerl.types import FinishReason, Group, Numbers, RejectReason, Request, Rollout, Sampling, Source

FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
"""How a response may end, by the word that vLLM and OpenAI's completions have for it."""
ATTEMPTS = 3
"""How often a response is asked for that the engine aborts."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine gave for one sample, usable or not."""

    token_ids: Sequence[int]
    """Exactly the generated tokens."""
    logprobs: Sequence[Any]
    """Of each token, in nats, as far as the engine says them."""
    text: str
    finish_reason: FinishReason
    policy_version: int
    """Of the weights that the engine had when it was asked."""


Ask = Callable[[Request, Sampling, int], Awaitable[Answer]]
"""Asks the engine once for a response to the prompt of the request that goes on after its prefix, with the seed that is given last. The
text of the answer is that of both."""


async def generate(request: Request, sampling: Sampling, ask: Ask) -> Group:
    """A response to the prompt for each seed, and why there is none where it cannot be used. All seeds are asked for at once."""
    results = await asyncio.gather(*(_one(request, *each, ask) for each in request.responses(sampling)))
    return Group(
        prompt=request.prompt,
        rollouts=tuple(each for each in results if isinstance(each, Rollout)),
        rejected=tuple(each for each in results if not isinstance(each, Rollout)),
    )


async def _one(request: Request, seed: int, sampling: Sampling, source: Source, ask: Ask) -> Rollout | RejectReason:
    for _ in range(ATTEMPTS):
        answer = await ask(request, sampling, seed)
        if answer.finish_reason == "abort":
            continue
        # Training on a token needs to know how probable it was; nothing is put in place of a number that is not there.
        if len(answer.logprobs) != len(answer.token_ids) or not all(map(_usable, answer.logprobs)):
            return "logprob"
        return Rollout(
            token_ids=Numbers(np.asarray(answer.token_ids, np.uint32)),
            logprobs=Numbers(np.asarray(answer.logprobs, np.float64)),
            text=answer.text,
            finish_reason=answer.finish_reason,
            policy_version=answer.policy_version,
            sampler=sampling,
            seed=seed,
            source=source,
            prefix_ids=request.prefix_ids,
        )
    return "abort"  # half a response is no response


def _usable(logprob: Any) -> bool:
    return isinstance(logprob, Real) and math.isfinite(logprob)
