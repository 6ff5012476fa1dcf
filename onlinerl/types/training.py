"""What is trained. Axis in comments: T tokens of one response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # a loss reads no more than what is in this file
    from onlinerl.types.rollouts import FinishReason

Unit = Literal["token", "sequence", "pair", "list"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One response with everything a loss may read about it. Optional fields are filled in stage by stage."""

    prompt_ids: tuple[int, ...]
    response_ids: Sequence[int]
    """Length T."""
    prefix: int = 0
    """How many tokens at the end of `prompt_ids` are those that the response was made to begin with, or that are before the step of a pair."""
    forced: int = 0
    """How many tokens at the start of `response_ids` nobody sampled. They have log-probs and values, and the policy is not asked for them."""
    score: float = 0.0
    """The oracle's score, or the win rate where the oracle returns none."""
    components: Mapping[str, float] = field(default_factory=dict)
    """The oracle's other scores, by name."""
    win_rate: float = 0.5
    """Mean win rate within its group, self included."""
    policy_weight: float = 1.0
    """Weight of what the loss asks of the policy; with 0 only the critic learns from this response."""
    finish_reason: FinishReason = "stop"
    policy_version: int | None = 0
    """Which version of the policy sampled it; None if none did: it is a stored answer."""
    behavior_logprobs: np.ndarray | None = None
    """f32[T], reported by the engine: of the policy that sampled."""
    old_logprobs: np.ndarray | None = None
    """f32[T], of the weights that training starts from, by the learner."""
    reference_logprobs: np.ndarray | None = None
    """f32[T], of the reference model, by the learner."""
    values: np.ndarray | None = None
    """f32[T], the critic's value of the state before each token."""
    advantages: np.ndarray | None = None
    """f32[T]."""
    returns: np.ndarray | None = None
    """f32[T], targets of the critic."""
    anchor_logprobs: np.ndarray | None = None
    """f32[T], of the base model, by the learner, beside those of the reference."""
    ches: np.ndarray | None = None
    """f32[2], of a pair, at its chosen response: centered hidden embedding similarity score, and the same normalized by length."""
    source: str = "policy"
    """Who wrote it, see `Rollout.source`."""
    token_weights: np.ndarray | None = None
    """f32[T], what each token counts in a loss on pairs; None: all alike."""

    def with_(self, **changes: object) -> TrainSequence:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainItem:
    """What is trained as one: a sample, a pair (chosen first, perhaps a third one to explore) or a list. Never split across micro-batches."""

    prompt_id: str
    sequences: tuple[TrainSequence, ...]
    prob: float = 1.0
    """For a pair: P(chosen beats rejected)."""
    weight: float = 1.0
    annotator: str = ""
    """Who judged it, see `Verdict`."""
    exploration: int | None = None
    """For a pair with an exploration response: which of the sequences that is; a third one where it is not one of the two."""
    online: tuple[int, ...] = ()
    """For a pair with samples of the policy for a KL: which of the sequences those are; one that was sampled twice is there twice."""
    nll: int | None = None
    """For a pair beside which another response than the chosen one is imitated: which of the sequences that is."""
    nll_tokens: float | None = None
    """By how many tokens the negative log-prob of what is imitated is divided, where it is not by its own."""
    units: float | None = None
    """As how many units of the loss it counts, where not as many as it holds: a step is divided by the sum."""
    iteration: int = 0
    """In which iteration its responses were sampled."""

    @property
    def is_pair(self) -> bool:
        """Whether the first two sequences are a pair."""
        return len(self.sequences) == 2 or self.exploration is not None or bool(self.online) or self.nll is not None

    @property
    def compared(self) -> tuple[TrainSequence, ...]:
        """The sequences without those that are there for a KL only: what must not have been cut."""
        if not self.online:
            return self.sequences
        return tuple(s for n, s in enumerate(self.sequences) if n < 2 or n == self.exploration)

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all sequences: the cost of one forward pass."""
        return sum(len(s.prompt_ids) + len(s.response_ids) for s in self.sequences)

    def count(self, unit: Unit) -> float:
        """How many units of the loss this item holds, or counts as."""
        tokens = sum(len(s.response_ids) - s.forced for s in self.sequences)
        own = tokens if unit == "token" else len(self.sequences) if unit == "sequence" else 1
        return own if self.units is None else self.units
