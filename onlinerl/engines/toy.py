"""A toy engine for fast contract tests of the loop: it draws tokens from one distribution, whatever the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from onlinerl.protocols.engine import InProcessEngine
from onlinerl.types import Group, Request, Rollout, Sampling, Source

__all__ = ["Toy", "ToyEngine"]


class Toy(InProcessEngine):
    """For tests; reads no key but its name."""

    name: str = "toy"
    forces_prefixes: ClassVar[bool] = True

    def open(self, vocabulary: int, decode: Callable[[Sequence[int]], str]) -> ToyEngine:
        """An engine with uniform weights."""
        return ToyEngine(vocabulary, decode)


class ToyEngine:
    """Samples each token independently from softmax(logits); the last token of the vocabulary ends a response.

    Args:
        vocabulary: number of tokens.
        decode: token ids -> text.
    """

    def __init__(self, vocabulary: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.logits = np.zeros(vocabulary, dtype=np.float64)
        self.version = 0

    def load(self, logits: np.ndarray, version: int) -> None:
        """Take on new weights."""
        self.logits, self.version = logits.astype(np.float64).copy(), version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Group]]:
        """One group per request, in order, each by itself."""
        for request in requests:
            one_by_one = (self._one(*each, request.prefix_ids) for each in request.responses(sampling))
            yield [Group(prompt=request.prompt, rollouts=tuple(one_by_one))]

    def _one(self, seed: int, sampling: Sampling, source: Source, prefix: Sequence[int]) -> Rollout:
        rng, greedy = np.random.default_rng(seed), sampling.temperature == 0
        logprobs = _log_softmax(self.logits if greedy else self.logits / sampling.temperature)
        end = len(self.logits) - 1
        tokens: list[int] = []
        while len(tokens) < sampling.max_new_tokens and end not in tokens:
            tokens.append(int(logprobs.argmax() if greedy else rng.choice(len(logprobs), p=np.exp(logprobs))))
        return Rollout(
            token_ids=tuple(tokens),
            logprobs=tuple(float(logprobs[t]) for t in tokens),
            text=" " + self._decode([t for t in (*prefix, *tokens) if t != end]),
            finish_reason="stop" if tokens[-1] == end else "length",
            policy_version=self.version,
            sampler=sampling,
            seed=seed,
            source=source,
            prefix_ids=tuple(prefix),
        )

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Log-probs f32[T] of each response."""
        logprobs = _log_softmax(self.logits)
        return [logprobs[list(response)].astype(np.float32) for _, response in sequences]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    logprobs: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return logprobs
