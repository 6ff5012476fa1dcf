"""Measuring an iterate on the held-out prompts: reward, divergence, win rate, length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onlinerl.controller.statistics import Divergence, Estimate, bootstrap, divergence, ratio, wilson
from onlinerl.protocols.learner import Learner
from onlinerl.types import Failure, Group, TrainSequence, Verdict

Judge = Callable[[Sequence[Group]], tuple[int, Mapping[str, Verdict | Failure]]]
"""Judges groups: how many verdicts that is, and they by prompt id."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Responses of one iterate to the held-out prompts, judged."""

    groups: Sequence[Group]
    """One response each, at temperature 1, in the order of the prompts."""
    verdicts: Mapping[str, Verdict | Failure]
    """By prompt id."""

    def score(self, prompt_id: str) -> float:
        """The oracle's score, NaN if there is none."""
        verdict = self.verdicts.get(prompt_id)
        return verdict.scores[0] if isinstance(verdict, Verdict) and verdict.scores is not None else math.nan


def sequences(groups: Sequence[Group]) -> list[TrainSequence]:
    """Every response of every group, for its log-probs."""
    return [
        TrainSequence(
            prompt_ids=g.prompt.token_ids, response_ids=r.token_ids, behavior_logprobs=np.asarray(r.logprobs, np.float32)
        )
        for g in groups
        for r in g.rollouts
    ]


def reward(evaluated: Evaluated) -> Estimate:
    """Mean score over prompts."""
    return bootstrap([evaluated.score(g.prompt.id) for g in evaluated.groups])


def length(evaluated: Evaluated) -> Estimate:
    """Mean response length in tokens."""
    return bootstrap([len(r.token_ids) for g in evaluated.groups for r in g.rollouts])


def truncated(evaluated: Evaluated) -> Estimate:
    """Share of responses that hit the length limit."""
    return wilson([float(r.finish_reason == "length") for g in evaluated.groups for r in g.rollouts])


def win_rate(now: Evaluated, then: Evaluated, judge: Judge) -> tuple[Estimate, int]:
    """How often an iterate beats another one on the same prompts, and how many more oracle calls that took; see `outcomes`."""
    won, asked = outcomes(now, then, judge)
    return wilson(won), asked


def outcomes(now: Evaluated, then: Evaluated, judge: Judge) -> tuple[list[float], int]:
    """1, 1/2 or 0 for each prompt on which an iterate beats, ties with or loses to another one, and how many more oracle calls that took.

    An oracle that scores has said it all already. One that compares is asked about each pair, in both orders if it does that:
    `judge` gets one group per prompt, the response of `now` and then that of `then`.
    """
    opponents = {g.prompt.id: g for g in then.groups}
    common = [g for g in now.groups if g.prompt.id in opponents]
    gaps = [_gap(now, then, g.prompt.id) for g in common]
    if common and not all(math.isnan(gap) for gap in gaps):
        return [_outcome(gap) for gap in gaps if not math.isnan(gap)], 0
    asked, results = judge([replace(g, rollouts=(g.rollouts[0], opponents[g.prompt.id].rollouts[0])) for g in common])
    wins = []
    for result in (results[g.prompt.id] for g in common):
        if isinstance(result, Verdict):
            cells = [result.matrix()[0, 1]] if result.preferences is None else _orders(result)
            known = [_outcome(p - 0.5) for p in cells if not math.isnan(p)]
            if known:  # an oracle that compared neither order has not said anything
                wins.append(float(np.mean(known)))
    return wins, asked


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What an iterate is better by than the base model on the same prompts, to decide by: the interval is of a bootstrap over prompts of what each
    prompt gained. Wilson's of a win rate takes a tie for half a coin flip, and is too wide where there are many."""

    reward: Estimate
    """Between the scores, mean over prompts; n is 0 where there are none, or the oracle was changed in between."""
    win_rate: Estimate
    """Above a half."""


def gains(now: Evaluated, base: Evaluated, won: Sequence[float]) -> Gains:
    """Of an iterate that has `won` against the base model (see `outcomes`)."""
    return Gains(
        reward=bootstrap([_gap(now, base, g.prompt.id) for g in now.groups]), win_rate=bootstrap([each - 0.5 for each in won])
    )


def _orders(verdict: Verdict) -> list[float]:
    """P(first response wins) as said in each of the two orders; NaN where not asked."""
    assert verdict.preferences is not None
    return [verdict.preferences[0][1], 1.0 - verdict.preferences[1][0]]


@dataclass(frozen=True, kw_only=True)
class Component:
    """What one of the scores says that an oracle keeps by name: of a member of `composite`, also of one that only watches."""

    score: Estimate
    """Mean over prompts."""
    win_rate: Estimate | None
    """Against the base model, by this score alone; None for the base model itself."""


def components(now: Evaluated, base: Evaluated | None) -> dict[str, Component]:
    """Of each score that the oracle gave the answers by name.

    Args:
        now: of an iterate.
        base: of the base model; None if that is the iterate.
    """
    known = (verdict for verdict in now.verdicts.values() if isinstance(verdict, Verdict))
    found = {}
    for name in sorted({name for verdict in known for name in verdict.components or ()}):
        own, then = _by(now, name), None if base is None else _by(base, name)
        gaps = [] if then is None else [_gap(own, then, g.prompt.id) for g in now.groups]
        wins = wilson([_outcome(gap) for gap in gaps if not math.isnan(gap)])
        found[name] = Component(score=reward(own), win_rate=None if then is None else wins)
    return found


def _by(evaluated: Evaluated, name: str) -> Evaluated:
    """The same answers with one of the scores that the oracle gave by name."""

    def verdict(result: Verdict | Failure) -> Verdict | Failure:
        if isinstance(result, Failure):
            return result
        return replace(result, scores=tuple((result.components or {}).get(name, (math.nan,))))

    return replace(evaluated, verdicts={key: verdict(result) for key, result in evaluated.verdicts.items()})


def _gap(now: Evaluated, then: Evaluated, prompt_id: str) -> float:
    """Between the two scores; NaN where one is missing, or where the oracle was changed in between and they mean different things."""
    versions = {v.oracle_version for v in (now.verdicts.get(prompt_id), then.verdicts.get(prompt_id)) if isinstance(v, Verdict)}
    return now.score(prompt_id) - then.score(prompt_id) if len(versions) == 1 else math.nan


def _outcome(gap: float) -> float:
    return 0.5 if gap == 0 else float(gap > 0)


def entropy_seq(own: Sequence[np.ndarray]) -> Estimate:
    """Mean of -log policy(y) over the policy's own samples y: an unbiased estimate of the entropy of its responses."""
    return bootstrap([-float(np.sum(x, dtype=np.float64)) for x in own])


def entropy_token(own: Sequence[np.ndarray]) -> Estimate:
    """The same per token of the sampled responses."""
    return ratio([-float(np.sum(x, dtype=np.float64)) for x in own], [len(x) for x in own])


def forward_kl(reference: Sequence[np.ndarray], policy: Sequence[np.ndarray]) -> Estimate:
    """KL(base || policy) in nats per sequence, from log-probs of the base model's own samples under both."""
    return bootstrap(
        [float(np.sum(r, dtype=np.float64) - np.sum(p, dtype=np.float64)) for r, p in zip(reference, policy, strict=True)]
    )


def drift(evaluated: Evaluated, learner: Learner, own: Sequence[np.ndarray], model: str | None) -> Divergence:
    """KL of the iterate to a saved model, on the iterate's own fresh samples; None means the iterate itself."""
    if model is None:
        return divergence(own, own)
    return divergence(own, learner.logprobs(sequences(evaluated.groups), model=model, temperature=1.0))


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Engine against learner on the same tokens with the same weights, in nats per token."""

    mean: float
    p99: float
    max: float
    k3: float
    tokens: int


def mismatch(groups: Sequence[Group], own: Sequence[np.ndarray]) -> Mismatch:
    """Compare the log-probs that came with the rollouts with the learner's."""
    theirs = np.concatenate([np.asarray(r.logprobs, np.float64) for g in groups for r in g.rollouts])
    e = np.concatenate([np.asarray(x, np.float64) for x in own]) - theirs
    gap = np.abs(e)
    return Mismatch(
        mean=float(gap.mean()),
        p99=float(np.percentile(gap, 99)),
        max=float(gap.max()),
        k3=float((np.exp(e) - 1 - e).mean()),
        tokens=e.size,
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that is said about one iterate."""

    answers: Evaluated
    kl_ref: Divergence
    """To the base model."""
    kl_prev: Divergence
    """To the iterate before."""
    kl_forward: Estimate | None
    """From the base model; None for the base model itself."""
    entropy_token: Estimate
    entropy_seq: Estimate
    wins: Mapping[str, Estimate]
    """Win rate by opponent: `base` and `prev`; empty for the base model."""
    gains: Gains | None
    """Over the base model; None for the base model itself."""
    components: Mapping[str, Component]
    """Of each score that the oracle keeps by name."""
    mismatch: Mismatch
    oracle_versions: Mapping[str, int]
    """Verdicts and comparisons by the version of the oracle that gave them: several if it was changed in between."""
