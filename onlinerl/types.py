"""Values that cross a stage boundary: frozen, keyword-only, serialisable, without torch.

Axes in comments: K responses of one prompt, T tokens of one response.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
RejectReason = Literal["logprob", "abort"]
Unit = Literal["token", "sequence", "pair"]


def derive_seed(*parts: object) -> int:
    """A 31-bit seed that depends on every part and on nothing else (R-F8).

    Seeds are derived, never drawn: the same (run seed, iteration, prompt, sample) gives the same seed whatever the number of
    replicas, the order of arrival or the number of restarts.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, rendered and tokenised exactly once; nothing downstream tokenises it again (R-F1)."""

    id: str
    """Unique within its source."""
    text: str
    """What the model sees, as text (after the chat template, if one applies)."""
    token_ids: tuple[int, ...]
    """What the model sees, as tokens."""
    messages: tuple[Message, ...] = ()
    """The conversation, for oracles that apply their own template; empty for plain-text continuation."""
    reference_answer: str | None = None
    """The known right answer, for verifiers."""
    source: str = ""
    """Where it came from, for slices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are drawn. The engine samples with it and the learner scores with it (R-E2)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    max_new_tokens: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Ask the engine for `len(seeds)` responses to one prompt, one seed each."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response as the engine produced it."""

    token_ids: tuple[int, ...]
    """Exactly the generated tokens, end-of-sequence token included when the model emitted one. Length T."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token under the sampling distribution, as reported by the engine. Length T."""
    text: str
    finish_reason: FinishReason
    policy_version: int
    """Which weights produced it: 0 is the base model, t the iterate of iteration t."""
    sampler: Sampling
    seed: int
    source: str = "policy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The responses to one prompt: K of them, less those the engine had to throw away."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """The usable ones, in the order of their seeds; there may be none."""
    rejected: tuple[RejectReason, ...] = ()
    """Why each of the others was thrown away: `logprob` (missing or not finite) or `abort` (never finished)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """How probable it is that response `first` beats response `second` of the same group."""

    first: int
    second: int
    prob: float

    def swap(self) -> Preference:
        """The same preference seen from the other side: P(second beats first) = 1 - P(first beats second)."""
        return Preference(first=self.second, second=self.first, prob=1.0 - self.prob)


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What an oracle is asked: judge these K responses to this prompt."""

    prompt: Prompt
    responses: tuple[str, ...]
    """Texts, length K. Oracles apply their own tokenizer and template (R-F6)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a judgement cost."""

    calls: int = 0
    seconds: float = 0.0
    usd: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What an oracle said about one group: scores, a matrix of pairwise probabilities, or both."""

    annotator: str
    """Which judge, model or human."""
    oracle_version: str
    """Hash of everything that could change the judgement; a new version starts a new series."""
    scores: tuple[float, ...] | None = None
    """Length K, higher is better; comparable within one prompt only."""
    preferences: tuple[tuple[float, ...], ...] | None = None
    """[K][K], exactly as returned: [i][j] = P(i beats j) with i shown first. Diagonal and unasked cells are NaN."""
    strength: tuple[tuple[float, ...], ...] | None = None
    """[K][K] strength of each preference on the oracle's own scale."""
    temperature: float = 1.0
    """In units of the score: how large a gap between two scores must be to mean odds of e to 1 (see `matrix`)."""
    raw: str | None = None
    """The judge's own words, for people."""
    cost: Cost = field(default_factory=Cost)

    def problem(self, count: int) -> Failure | None:
        """What is wrong with this as a judgement of `count` responses, or None (R-G1)."""
        if self.scores is None and self.preferences is None:
            return Failure(kind="parse_fail", message="a Verdict with neither scores nor preferences")
        if self.scores is not None:
            if len(self.scores) != count:
                return Failure(kind="wrong_length", message=f"{len(self.scores)} scores for {count} responses")
            if not np.isfinite(self.scores).all():
                return Failure(kind="non_finite", message=f"scores {self.scores}")
        if self.preferences is not None:
            if [len(row) for row in self.preferences] != [count] * count:
                return Failure(kind="wrong_length", message=f"the preferences of {count} responses must be {count} x {count}")
            cells = np.asarray(self.preferences, dtype=np.float64)
            if ((cells < 0) | (cells > 1)).any():
                return Failure(kind="non_finite", message="a preference is no probability")
        if self.strength is not None and np.asarray(self.strength, dtype=np.float64).shape != (count, count):
            return Failure(kind="wrong_length", message=f"the strengths of {count} responses must be {count} x {count}")
        texts = (self.annotator, self.oracle_version, self.raw or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.cost, Cost):
            return Failure(kind="parse_fail", message="annotator, oracle_version and raw must be texts, and cost a Cost")
        return None

    def judged(self) -> np.ndarray:
        """bool[K]: which responses the oracle said something about: a score and, where it compares, at least one comparison.

        A response that nobody judged has no score, no win rate and no place in a batch.
        """
        known = np.ones(len(self.scores if self.scores is not None else self.preferences or ()), dtype=bool)
        if self.scores is not None:
            known &= np.isfinite(np.asarray(self.scores, dtype=np.float64))
        if self.preferences is not None:
            compared = ~np.isnan(self.matrix())
            np.fill_diagonal(compared, False)
            known &= compared.any(axis=1)
        return known

    def matrix(self) -> np.ndarray:
        """P[i, j] = probability that i beats j, shape [K, K], diagonal 1/2, P + P^T = 1 where known.

        A returned matrix is averaged over both orders, (P_raw + 1 - P_raw^T) / 2; one order alone is used as it is. Scores
        induce Bradley-Terry: P = sigmoid((s_i - s_j) / temperature). Unknown cells are NaN.

        Raises:
            ValueError: if the verdict holds neither scores nor preferences.
        """
        if self.preferences is not None:
            raw = np.asarray(self.preferences, dtype=np.float64)
            mirrored = 1.0 - raw.T
            probs = np.where(np.isnan(raw), mirrored, np.where(np.isnan(mirrored), raw, (raw + mirrored) / 2))
        elif self.scores is not None:
            scores = np.asarray(self.scores, dtype=np.float64)
            with np.errstate(over="ignore"):  # a huge gap saturates at 0 or 1, which is what it means
                probs = 1.0 / (1.0 + np.exp(-(scores[:, None] - scores[None, :]) / self.temperature))
        else:
            raise ValueError("a Verdict needs scores or preferences")
        np.fill_diagonal(probs, 0.5)
        return probs

    def win_rates(self) -> np.ndarray:
        """Mean probability of beating a random judged response of the group, itself included; NaN for one that was not judged.

        Shape [K], within [0.5/K, 1 - 0.5/K].
        """
        # The diagonal is in every row, so no row is all NaN.
        return np.where(self.judged(), np.nanmean(self.matrix(), axis=1), np.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The oracle could not judge. Never a score, never a tie (R-G1)."""

    kind: Literal["error", "timeout", "refused", "parse_fail", "non_finite", "wrong_length", "budget"]
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A group with its verdict: what is stored and what training data is built from."""

    group: Group
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two responses of one judged group, the better one first."""

    chosen: int
    rejected: int
    prob: float
    """P(chosen beats rejected), within [0, 1]."""
    gap: float = 0.0
    """By how much it was chosen, in the units the builder selects by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One response with everything a loss may read about it. Optional fields are filled in stage by stage."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Length T."""
    score: float = 0.0
    """The oracle's score, or the win rate where the oracle returns none."""
    win_rate: float = 0.5
    """Mean win rate within its group, self included."""
    policy_weight: float = 1.0
    """Weight of what the loss asks of the policy; with 0 only the critic learns from this response."""
    finish_reason: FinishReason = "stop"
    policy_version: int = 0
    behaviour: np.ndarray | None = None
    """f32[T], log-probs reported by the engine."""
    old: np.ndarray | None = None
    """f32[T], log-probs of the learner's weights at rollout time."""
    reference: np.ndarray | None = None
    """f32[T], log-probs of the reference model."""
    values: np.ndarray | None = None
    """f32[T], the critic's value of the state before each token."""
    advantages: np.ndarray | None = None
    """f32[T]."""
    returns: np.ndarray | None = None
    """f32[T], targets of the critic."""

    def with_(self, **changes: object) -> TrainSequence:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainItem:
    """What is trained as one: a sample (1 sequence), a pair (2, chosen first) or a list. Never split across micro-batches."""

    prompt_id: str
    sequences: tuple[TrainSequence, ...]
    prob: float = 1.0
    """For a pair: P(chosen beats rejected)."""
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Prompt and response tokens of all sequences: the cost of one forward pass."""
        return sum(len(s.prompt_ids) + len(s.response_ids) for s in self.sequences)

    def count(self, unit: Unit) -> int:
        """How many units of the loss this item holds."""
        if unit == "token":
            return sum(len(s.response_ids) for s in self.sequences)
        return len(self.sequences) if unit == "sequence" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One measured figure with its error bar: one line of metrics.jsonl."""

    name: str
    value: float
    unit: str
    iteration: int
    n: int = 1
    se: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    estimator: str = "mean"
    policy_version: int | None = None
    oracle_version: str | None = None
    set: str | None = None
    attempt: int = 0
    insufficient: bool = False
    """True when n is below the smallest n the metric may be trusted at; such a value never triggers a decision."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one push of the weights into all replicas did, and how it was proved (R-B2, R-A8)."""

    version: int
    seconds: float
    """Wall time of push and proof."""
    bytes: int
    """Bytes of weights sent once; every replica receives them."""
    replicas: int
    backend: str
    phases: Mapping[str, float]
    """Seconds per part: push, cache_reset, proof."""
    proved: bool
    tensors_checked: int
    canary_nats: float
    """Mean |log-prob difference| between learner and engine over the canary tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What one pass of the learner over the items did."""

    steps: int
    tokens: int
    """Prompt and response tokens trained on, all epochs."""
    metrics: Sequence[Mapping[str, float]]
    """Per optimizer step: loss, grad_norm, lr and the algorithm's own metrics, already averaged over the global batch."""
    skipped: int = 0
    """Steps dropped because the gradient was not finite (R-E6)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """What a policy that has not been trained yet says about itself and about the log-probs that its items carry."""

    loss: float
    """Per unit, with reference = old = what the policy says in the same pass."""
    repeat_kl: float
    """Difference of two passes of the policy over the same items, in nats per sequence."""
    stored_loss: float
    """Per unit, with the arrays that the items carry."""
    stored_loss_slope: float
    """How far `stored_loss` can move if every log-prob is off by one nat."""
    stored_gaps: Mapping[str, float]
    """By name of an array that the items carry (reference, old, values): how far it is from what the policy says, token by token.
    Mean of the worst sequence, in nats per token; values relative to the largest one if that is above 1."""
    base_gap: float
    """Mean |log-prob difference| between the policy and the base model as it is on disk, in nats per token."""
