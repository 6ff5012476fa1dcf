"""What the engine is asked for and what it answers. Axis in comments: T tokens of one response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from onlinerl.types.prompts import Prompt

FinishReason = Literal["stop", "length", "abort"]
RejectReason = Literal["logprob", "abort"]
Source = Literal["policy", "greedy", "reference", "mixture", "teacher", "carried"]
"""Where a response is from: drawn from the policy, its most probable token taken at each position, drawn from the base model or from a
mixture of policy and reference, the stored answer to the prompt, which nobody sampled, or of the pair that was trained of the prompt before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are drawn. The engine samples with it and the learner scores with it."""

    temperature: float = 1.0
    """0 takes the most probable token at each position. Its log-prob is then reported at temperature 1, where it is not simply 0."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    max_new_tokens: int = 256

    def greedy(self) -> Sampling:
        """The same length at temperature 0, of the whole vocabulary."""
        return replace(self, temperature=0.0, top_p=1.0, top_k=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Ask the engine for `len(seeds)` responses to one prompt, one seed each."""

    prompt: Prompt
    seeds: tuple[int, ...]
    greedy: bool = False
    """Whether the last of them is taken greedily instead of being drawn. It has a seed like the others, which names it."""
    source: Source = "policy"
    """Of those that are drawn."""
    prefix_ids: tuple[int, ...] = ()
    """Tokens that all of them begin with, which are not sampled. They count towards the longest response."""

    def responses(self, sampling: Sampling) -> list[tuple[int, Sampling, Source]]:
        """Seed, sampling and source of each response, in their order; `sampling` is that of those that are drawn."""
        if self.prefix_ids:
            sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(self.prefix_ids))
        drawn: list[tuple[int, Sampling, Source]] = [(seed, sampling, self.source) for seed in self.seeds]
        return [*drawn[:-1], (self.seeds[-1], sampling.greedy(), "greedy")] if self.greedy else drawn


class Draw(NamedTuple):
    """What a learner is asked to respond to."""

    prompt_ids: tuple[int, ...]
    seed: int


class Drawn(NamedTuple):
    """How it responds."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token under the distribution that it was drawn from, in nats."""
    ended: bool
    """Whether it came to its end, instead of the longest response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response as the engine produced it."""

    token_ids: Sequence[int]
    """Exactly the generated tokens, end-of-sequence token included when the model emitted one. Length T; a tuple, or `Numbers`."""
    prefix_ids: Sequence[int] = ()
    """Tokens that it was made to begin with (`Request.prefix_ids`), before `token_ids`. Nobody sampled them, so they have no log-probs."""
    logprobs: Sequence[float]
    """Natural-log probability of each token under the sampling distribution (temperature 1 for a greedy response), as reported by the
    engine. Length T."""
    text: str
    """Of the whole response, of what it was made to begin with too."""
    finish_reason: FinishReason
    policy_version: int
    """Which weights produced it: 0 is the base model, t the iterate of iteration t, -1 none: it is a stored answer, whose `logprobs` are NaN."""
    sampler: Sampling
    seed: int
    source: str = "policy"
    """See `Source`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The responses to one prompt: K of them, less those the engine had to throw away."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """The usable ones, in the order of their seeds; there may be none."""
    rejected: tuple[RejectReason, ...] = ()
    """Why each of the others was thrown away: `logprob` (missing or not finite) or `abort` (never finished)."""
