"""What the parts say about what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


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
    """What one push of the weights into all replicas did, and how it was proved."""

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
    """What the learner did in some optimizer steps."""

    steps: int
    tokens: int
    """Prompt and response tokens trained on, all epochs."""
    metrics: Sequence[Mapping[str, float]]
    """Per optimizer step: loss, grad_norm, learning_rate and the algorithm's own metrics, already averaged over the global batch."""
    skipped: int = 0
    """Steps dropped because the gradient was not finite."""
    stopped: int = 0
    """Steps not taken because the KL to where they began exceeded `training.target_kl`. A learner reports the first of them, which ends it: no
    step, no tokens, and what was measured."""

    def followed_by(self, other: UpdateReport) -> UpdateReport:
        """Of both together."""
        return UpdateReport(
            steps=self.steps + other.steps,
            tokens=self.tokens + other.tokens,
            metrics=[*self.metrics, *other.metrics],
            skipped=self.skipped + other.skipped,
            stopped=self.stopped + other.stopped,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """What a policy that has not been trained yet says about itself and about the log-probs that its items carry."""

    loss: float
    """Per unit, with reference_logprobs = anchor_logprobs = old_logprobs = what the policy says in the same pass."""
    repeat_kl: float
    """Difference of two passes of the policy over the same items, in nats per sequence."""
    stored_loss: float
    """Per unit, with the arrays that the items carry."""
    stored_loss_slope: float
    """How far `stored_loss` can move if every log-prob is off by one nat."""
    stored_gaps: Mapping[str, float]
    """By name of an array that the items carry (reference_logprobs, anchor_logprobs, old_logprobs, values): how far it is from what
    the policy says, token by token. Mean of the worst sequence, in nats per token; values relative to the largest one if that is above 1."""
    noise: float
    """The same between two passes of the policy of which one pads its batch further: rounding, in the learner's dtype, on these items."""
    stored_tilts: Mapping[str, float]
    """By name of an array of log-probs that the items carry: by how much it is off in proportion to how improbable a token is, beyond
    what rounding explains. Nats per token at one standard deviation. Another temperature shows here first."""
    base_gap: float
    """Mean |log-prob difference| between the policy and the base model as it is on disk, in nats per token."""
    reference_kl: float = 0.0
    """Mean KL per token between the policy and the reference that runs beside it, in nats; 0 if none does."""
