"""What a phase records when it is done: what later phases, a resume and `show` read of it.

A record is JSON in the manifest of its iteration. That of an older version may lack keys: `get` is for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict


class PhaseRecord(TypedDict, total=False):
    """Of any phase."""

    seconds: float
    """How long it worked, without `waited`."""
    began: float
    """Unix time."""
    ended: float
    """Unix time."""
    waited: float
    """Seconds in which it waited for the phase that it follows."""


class SelectRecord(PhaseRecord):
    """Of `select`."""

    prompts: int
    """How many may be sampled."""
    visited: int
    """Those of them that the selector knew verdicts of."""
    reused: int
    """Those of them whose responses of an earlier iteration are trained on once more, instead of being sampled."""
    newest: int
    """The newest iteration whose verdicts it was told."""


class SampleRecord(PhaseRecord):
    """Of `sample`."""

    samples: int
    """Usable responses."""
    tokens: int
    prompts: int
    truncated: int
    """Responses that hit max_new_tokens."""
    rejected: Mapping[str, int]
    """Responses that could not be used, by reason."""
    next_cursor: int
    """Where the prompts of the next iteration begin."""
    policy_version: int
    kept: NotRequired[Sequence[str]]
    """With dynamic sampling: the prompts that the iteration goes on with, by id, in their order."""
    useful: NotRequired[int]
    """With dynamic sampling: prompts whose responses the oracle told apart; those that are not kept are surplus."""
    rounds: NotRequired[int]
    reused: NotRequired[Mapping[str, int]]
    """Where responses of earlier iterations may be trained on once more: prompts whose responses are, by how many iterations ago these were
    sampled. None of the other figures counts them, but for `kept` and `useful`."""
    tokens_saved: NotRequired[int]
    """Of those responses."""


class SampleMixtureRecord(PhaseRecord):
    """Of `sample_mixture`."""

    samples: int
    """Responses of the mixture."""
    tokens: int
    policy_version: int
    """Of the policy in the mixture."""
    reference: int | None
    """Which iterate the reference in it is."""
    weight: float
    """Of the reference."""


class SampleReferenceRecord(PhaseRecord):
    """Of `sample_reference`."""

    samples: int
    """Usable responses of the base model."""
    tokens: int
    rejected: Mapping[str, int]
    """Responses that could not be used, by reason."""
    policy_version: int
    pushes: int
    """How often weights were pushed: to the base model and back, or not at all where that is the policy."""


class ExamineRecord(PhaseRecord):
    """Of `examine`."""

    asked: int
    """Pairs that the oracle was asked about; 0 where it was not their turn."""
    failures: int
    figures: Mapping[str, Any] | None
    """How it did: accuracy with intervals, by length and source, and calibration."""
    agreement: float | None
    """Share of the pairs of which it says the same as at first."""


class RefreshRecord(PhaseRecord):
    """Of `refresh`."""

    asked: int
    """Groups that the oracle was asked about which the reward model learns from."""
    failures: int
    trained: bool
    """Whether there was a training; where there was none `reason` says why, but for an oracle that follows the policy."""
    taken: bool
    """Whether the oracle has other weights from now on."""
    reason: str | None
    """Why not; None where they are taken, or it was not their turn."""
    weights: str | None
    """Where those are that were taken: their directory, relative to that of the run."""
    oracle_versions: Sequence[str]
    """Of the oracle up to now, and from now on."""
    comparisons: Mapping[str, int]
    """`trained` and `heldout`."""
    before: Interval | None
    """Accuracy on the comparisons that are held out of the weights that the training began with."""
    after: Interval | None
    change: Interval | None
    """The difference of both; a training whose whole interval is below 0 is not taken."""
    reward_shift: Interval | None
    """By how much the same answers to the held-out prompts score higher under the new version."""


class LabelRecord(PhaseRecord):
    """Of `label`."""

    oracle_calls: int
    failures: int
    oracle_versions: Mapping[str, int]
    """Verdicts by the version of the oracle that gave them; several if it was changed in between."""


class AnnotateRecord(PhaseRecord):
    """Of `annotate`."""

    sequences: int
    reference: int | None
    """The iterate that the reference log-probs are from; the newest one in it where the reference is an average."""


class TrainRecord(PhaseRecord):
    """Of `train`."""

    steps: int
    tokens: int
    skipped: int
    """Steps whose gradient was not finite."""
    stopped: int
    """Steps that were not taken because of `training.target_kl`."""
    items: int
    truncated: int
    dropped: Mapping[str, int]
    """What was not trained on, by reason."""
    contradicted: int
    figures: Mapping[str, float]
    """What the algorithm remembers."""
    idle: str | None
    """Why there was nothing to learn."""
    idle_in_a_row: int
    loss_first: float | None
    loss_last: float | None
    reference: int | None
    policy_version: int
    """Of the policy that training started from."""
    replayed: Mapping[str, int]
    """Items of earlier iterations, before `select`, by how many iterations old they were."""
    sampled_by: Sequence[int]
    """Versions of the policy that sampled what was trained on."""


class SyncRecord(PhaseRecord):
    """Of `sync`; `SyncReport` says what each key means."""

    bytes: int
    proved: bool
    backend: str
    replicas: int
    tensors_checked: int
    canary_nats: float
    parts: Mapping[str, float]


class AnswerRecord(PhaseRecord):
    """Of `answer`."""

    samples: int
    tokens: int


class Interval(TypedDict):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class ComponentRecord(TypedDict):
    """Of a score that the oracle keeps by name, on the held-out prompts."""

    score: Interval
    win_rate: Interval | None
    """Against the base model, by this score alone."""


class MeasureRecord(PhaseRecord):
    """Of `measure`: what an iterate is worth; the catalogue of metrics says what each figure is."""

    reward: float
    reward_interval: Sequence[float]
    kl_ref: float
    kl_prev: float
    kl_ref_k1: float
    kl_ref_k3: float
    kl_estimator: str
    kl_conflict: bool
    kl_forward: float | None
    entropy_token: float
    win_rate: Interval | None
    """Against the base model."""
    win_rate_prev: float | None
    """Against the iterate before."""
    gains: Mapping[str, Interval] | None
    """Over the base model on the same prompts, in `reward` and `win_rate` (above a half), with the interval that is decided by; None for the base
    model, and in runs of older versions."""
    components: Mapping[str, ComponentRecord]
    """By name; empty where the oracle keeps none."""
    length: float
    truncated: float
    logp_mismatch: float
    insufficient: Sequence[str]
    """Figures measured on too few prompts to decide by."""
    oracle_calls: int
    oracle_versions: Mapping[str, int]
    """Verdicts and comparisons by the version of the oracle that gave them."""


class CommitRecord(PhaseRecord):
    """Of `commit`."""

    status: str
    """What became of the iterate: `promoted`, or `keep` where there was nothing to learn."""
    best: int
    """The best iterate so far by the held-out prompts, see `best_iterate`."""


class PhaseRecords(TypedDict, total=False):
    """Of the finished phases of an iteration, by name; a phase that somebody adds to the graph has one too."""

    examine: ExamineRecord
    select: SelectRecord
    sample_reference: SampleReferenceRecord
    sample_mixture: SampleMixtureRecord
    sample: SampleRecord
    label: LabelRecord
    annotate: AnnotateRecord
    train: TrainRecord
    checkpoint: PhaseRecord
    sync: SyncRecord
    answer: AnswerRecord
    measure: MeasureRecord
    refresh: RefreshRecord
    commit: CommitRecord
