"""What an oracle is asked and what it answers. Axis in comments: K responses of one prompt."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from onlinerl.types.prompts import Prompt
from onlinerl.types.rollouts import Group
from onlinerl.types.seeds import derive_seed


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
    """Texts, length K. Oracles apply their own tokenizer and template."""
    iteration: int | None = None
    """Of the run that asks; None outside of one, as for a trial. Who is asked may depend on it and on `heldout`, what is said may not."""
    heldout: bool = False
    """Whether the responses answer a held-out prompt."""


def label_key(query: Query, oracle_version: str) -> str:
    """By which the same question to the same oracle is recognised: a hash of the oracle's version and of all that an oracle may read."""
    prompt = query.prompt
    said = [[message.role, message.content] for message in prompt.messages]
    read = [oracle_version, prompt.id, prompt.text, said, prompt.reference_answer, prompt.source, query.responses]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a judgement cost."""

    calls: int = 0
    seconds: float = 0.0
    usd: float = 0.0
    tokens: int = 0
    """Read and written together."""
    tokens_out: int = 0
    """Of them, those that a judge wrote."""

    def plus(self, other: Cost) -> Cost:
        """Of both together."""
        return Cost(
            calls=self.calls + other.calls,
            seconds=self.seconds + other.seconds,
            usd=self.usd + other.usd,
            tokens=self.tokens + other.tokens,
            tokens_out=self.tokens_out + other.tokens_out,
        )


FailureKind = Literal["error", "timeout", "refused", "parse_fail", "non_finite", "wrong_length", "budget"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replies:
    """What came of the questions that a judgement is made of, where these are several: one for each response, or for each comparison."""

    asked: int = 0
    """Questions, each with one reply, however often it was tried. 0 where the group is one question."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """How many of them have no usable reply, by `FailureKind`. What they were about is unknown."""

    @property
    def lost(self) -> int:
        """Of all kinds."""
        return sum(self.failed.values())

    def possible(self) -> bool:
        """Whether these numbers can be true."""
        counts = self.failed.values()
        return {*self.failed} <= {*get_args(FailureKind)} and all(n >= 0 for n in counts) and self.lost <= self.asked

    def plus(self, other: Replies) -> Replies:
        """Of both together."""
        return Replies(asked=self.asked + other.asked, failed=dict(Counter(self.failed) + Counter(other.failed)))


COMPONENT = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = ("score", "kl")
"""Not names of components: what `Verdict.scores` holds, and the divergence from the reference."""


@lru_cache(maxsize=256)  # several ask about one and the same group
def induced(scores: tuple[float, ...], temperature: float) -> np.ndarray:
    """P[i, j] = sigmoid((s_i - s_j) / temperature), shape [K, K]; nobody may write to it."""
    s = np.asarray(scores, dtype=np.float64)
    with np.errstate(over="ignore"):  # a huge gap saturates at 0 or 1, which is what it means
        probs: np.ndarray = 1.0 / (1.0 + np.exp(-(s[:, None] - s[None, :]) / temperature))
    np.fill_diagonal(probs, 0.5)
    probs.flags.writeable = False
    return probs


def disagreement(members: np.ndarray) -> np.ndarray:
    """H(mean of p) - mean of H(p) over the first axis of probabilities [M, K, K], H the entropy of a coin: within [0, log 2] nats, 0 where all
    say the same; NaN where one says nothing.

    "Bayesian Active Learning for Classification and Preference Learning" (arXiv 1112.5745), equation 2; as the estimator of
    "Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference Optimization".
    """
    nats: np.ndarray = np.clip(_entropy(members.mean(axis=0)) - _entropy(members).mean(axis=0), 0.0, math.log(2))
    return nats


def _entropy(probs: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        heads, tails = (np.where(p == 0, 0.0, p * np.log(p)) for p in (probs, 1.0 - probs))
    total: np.ndarray = -(heads + tails)
    return total


def _both_orders(one: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """The mean where both are known, else the one that is."""
    return np.where(np.isnan(one), mirrored, np.where(np.isnan(mirrored), one, (one + mirrored) / 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What an oracle said about one group: scores, a matrix of pairwise probabilities, or both."""

    annotator: str
    """Which judge, model or human."""
    oracle_version: str
    """Hash of everything that could change the judgement; a new version starts a new series."""
    scores: tuple[float, ...] | None = None
    """Length K, higher is better; comparable within one prompt only."""
    unjudged: tuple[int, ...] = ()
    """Responses that a score was asked for and not given; theirs is NaN. Any other NaN makes the verdict a Failure."""
    preferences: tuple[tuple[float, ...], ...] | None = None
    """[K][K], exactly as returned: [i][j] = P(i beats j) with i shown first. Diagonal and unasked cells are NaN."""
    log_odds: tuple[tuple[float, ...], ...] | None = None
    """[K][K], the log-odds of the same cells as returned, where there are any; `matrix` is then made of them."""
    on_disagree: Literal["average", "tie", "drop"] = "average"
    """What a pair is whose two orders name different winners: the mean of both, a tie, or not judged."""
    strength: tuple[tuple[float, ...], ...] | None = None
    """[K][K] strength of each preference on the oracle's own scale."""
    uncertainty: tuple[tuple[float, ...], ...] | None = None
    """[K][K], of an oracle that has judged several times: by how much its judgements disagree about each pair, in nats (see
    `disagreement`). NaN where unknown."""
    components: Mapping[str, tuple[float, ...]] | None = None
    """Other scores of the responses beside `scores`, by name (lower case), each of length K: helpfulness, harm, ... Finite, but for those
    of `unjudged` responses."""
    temperature: float = 1.0
    """In units of the score, or of the log-odds: how large a gap between two scores must be to mean odds of e to 1 (see `matrix`)."""
    raw: str | None = None
    """The judge's own words, for people."""
    cost: Cost = field(default_factory=Cost)
    replies: Replies = field(default_factory=Replies)
    """How many of its questions have failed, and how: they count towards `max_failed_labels`, as failed groups do."""

    def problem(self, count: int) -> Failure | None:
        """What is wrong with this as a judgement of `count` responses, or None."""
        if self.scores is None and self.preferences is None:
            return Failure(kind="parse_fail", message="a Verdict with neither scores nor preferences")
        if self.scores is not None:
            if len(self.scores) != count:
                return Failure(kind="wrong_length", message=f"{len(self.scores)} scores for {count} responses")
            values = np.asarray(self.scores, dtype=np.float64)
            if np.isinf(values).any() or set(np.flatnonzero(np.isnan(values)).tolist()) != {*self.unjudged}:
                return Failure(kind="non_finite", message=f"scores {self.scores}")
        if self.preferences is not None:
            if [len(row) for row in self.preferences] != [count] * count:
                return Failure(kind="wrong_length", message=f"the preferences of {count} responses must be {count} x {count}")
            cells = np.asarray(self.preferences, dtype=np.float64)
            if ((cells < 0) | (cells > 1)).any():
                return Failure(kind="non_finite", message="a preference is no probability")
        if self.components is not None and (wrong := self._wrong_component(count)) is not None:
            return wrong
        for what, cells_of in (("strengths", self.strength), ("log-odds", self.log_odds)):
            if cells_of is not None and np.asarray(cells_of, dtype=np.float64).shape != (count, count):
                return Failure(kind="wrong_length", message=f"the {what} of {count} responses must be {count} x {count}")
        if self.log_odds is not None and (self.preferences is None or np.isinf(self.log_odds).any()):
            return Failure(kind="non_finite", message="log-odds without preferences, or infinite ones")
        if self.uncertainty is not None:
            nats = np.asarray(self.uncertainty, dtype=np.float64)
            if nats.shape != (count, count):
                return Failure(kind="wrong_length", message=f"the uncertainties of {count} responses must be {count} x {count}")
            if ((nats < -1e-9) | (nats > math.log(2) + 1e-9)).any():
                return Failure(kind="non_finite", message="an uncertainty is not between 0 and log 2")
        texts = (self.annotator, self.oracle_version, self.raw or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.cost, Cost):
            return Failure(kind="parse_fail", message="annotator, oracle_version and raw must be texts, and cost a Cost")
        if not isinstance(self.replies, Replies) or not self.replies.possible():
            said = (
                f"replies must be Replies, at most as many failed as asked, by kinds out of {', '.join(get_args(FailureKind))}"
            )
            return Failure(kind="parse_fail", message=said)
        return None

    def _wrong_component(self, count: int) -> Failure | None:
        for name, values in (self.components or {}).items():
            if not (isinstance(name, str) and COMPONENT.fullmatch(name)) or name in RESERVED:
                message = f"{name!r} as the name of a score: it takes lower-case letters, digits and _, and is not {' or '.join(RESERVED)}"
                return Failure(kind="parse_fail", message=message)
            if len(values) != count:
                return Failure(kind="wrong_length", message=f"{len(values)} numbers as {name} for {count} responses")
            unknown = set(np.flatnonzero(~np.isfinite(np.asarray(values, dtype=np.float64))).tolist())
            if not unknown <= {*self.unjudged}:
                return Failure(kind="non_finite", message=f"{name} {values}")
        return None

    def judged(self) -> np.ndarray:
        """bool[K]: which responses the oracle said something about: a score and, where it compares, at least one comparison.

        A response that nobody judged has no score, no win rate and no place in a batch.
        """
        if self.scores is not None:
            known = np.isfinite(np.asarray(self.scores, dtype=np.float64))
        else:
            known = np.ones(len(self.preferences or ()), dtype=bool)
        if self.preferences is not None:
            compared = ~np.isnan(self.matrix())
            np.fill_diagonal(compared, False)
            known &= compared.any(axis=1)
        return known

    def matrix(self) -> np.ndarray:
        """P[i, j] = probability that i beats j, shape [K, K], diagonal 1/2, P + P^T = 1 where known.

        A returned matrix is averaged over both orders, (P_raw + 1 - P_raw^T) / 2; one order alone is used as it is. Where there are
        log-odds, it is sigmoid(L / temperature), L = (L_raw - L_raw^T) / 2, without what the place in the prompt adds. Scores
        induce Bradley-Terry: P = sigmoid((s_i - s_j) / temperature). Unknown cells are NaN.

        Raises:
            ValueError: if the verdict holds neither scores nor preferences.
        """
        if self.preferences is not None:
            raw = np.asarray(self.preferences, dtype=np.float64)
            if self.log_odds is None:
                probs = _both_orders(raw, 1.0 - raw.T)
            else:
                odds = np.asarray(self.log_odds, dtype=np.float64)
                with np.errstate(over="ignore"):
                    probs = 1.0 / (1.0 + np.exp(-_both_orders(odds, -odds.T) / self.temperature))
            if self.on_disagree != "average":
                probs[self.disagreements()] = 0.5 if self.on_disagree == "tie" else np.nan
        elif self.scores is not None:
            return induced(tuple(map(float, self.scores)), float(self.temperature))
        else:
            raise ValueError("a Verdict needs scores or preferences")
        np.fill_diagonal(probs, 0.5)
        return probs

    def odds(self) -> np.ndarray:
        """Log-odds that i beats j, [K, K], skew-symmetric: those of `matrix`. Log-odds and scores as they were given lose nothing where
        probabilities are nearly 0 or 1; certain probabilities are infinite ones. Unknown cells are NaN.

        Raises:
            ValueError: if the verdict holds neither scores nor preferences.
        """
        if self.preferences is None and self.scores is not None:
            scores = np.asarray(self.scores, dtype=np.float64) / self.temperature
            odds = scores[:, None] - scores[None, :]
        elif self.log_odds is None:
            probs = self.matrix()
            with np.errstate(divide="ignore"):
                odds = np.log(probs) - np.log1p(-probs)
        else:
            given = np.asarray(self.log_odds, dtype=np.float64)
            odds = _both_orders(given, -given.T) / self.temperature
            if self.on_disagree != "average":
                odds[self.disagreements()] = 0.0 if self.on_disagree == "tie" else np.nan
        np.fill_diagonal(odds, 0.0)
        return odds

    def disagreements(self) -> np.ndarray:
        """bool[K, K]: pairs whose two orders name different winners, that is both times the response shown first, or the second."""
        raw = np.asarray(self.preferences, dtype=np.float64) - 0.5
        flips: np.ndarray = raw * raw.T > 0  # NaN is not
        np.fill_diagonal(flips, False)
        return flips

    def mean_uncertainty(self) -> float | None:
        """Mean of `uncertainty` over the pairs of which it is known; None if there is none."""
        if self.uncertainty is None:
            return None
        nats = np.asarray(self.uncertainty, dtype=np.float64)
        known = nats[np.triu_indices(len(nats), k=1)]
        known = known[~np.isnan(known)]
        return float(known.mean()) if len(known) else None

    def win_rates(self) -> np.ndarray:
        """Mean probability of beating a random judged response of the group, itself included; NaN for one that was not judged.

        Shape [K], within [0.5/K, 1 - 0.5/K].
        """
        matrix = self.matrix()
        known = ~np.isnan(matrix)
        # As np.nanmean, which takes longer for so few numbers. The diagonal is in every row, so none is all NaN.
        means = (matrix if known.all() else np.where(known, matrix, 0.0)).sum(axis=1) / known.sum(axis=1)
        return np.where(self.judged(), means, np.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The oracle could not judge. Never a score, never a tie."""

    kind: FailureKind
    message: str
    cost: Cost = field(default_factory=Cost)
    """What was paid all the same."""
    replies: Replies = field(default_factory=Replies)
    """Of its questions, where it had several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A group with its verdict: what is stored and what training data is built from."""

    group: Group
    verdict: Verdict

    def uncertainty(self, pair: Pair) -> float | None:
        """How uncertain the label of a pair is, in nats, within [0, log 2] (`Verdict.uncertainty`); None if nobody says."""
        said = self.verdict.uncertainty
        nats = math.nan if said is None else said[pair.chosen][pair.rejected]
        return None if math.isnan(nats) else min(max(nats, 0.0), math.log(2))

    def is_cut(self, pair: Pair) -> bool:
        """Whether what is trained of one of the two ends where the limit on tokens has cut it: steps of several responses end before."""
        ends = [(i,) for i in (pair.chosen, pair.rejected)] if pair.steps is None else [step.leaves for step in pair.steps]
        return any(len(leaves) == 1 and self.group.rollouts[leaves[0]].finish_reason == "length" for leaves in ends)

    def chance(self, pair: Pair) -> float:
        """Uniform on [0, 1), from the seeds of both responses: from the run's seed, iteration and prompt, not from their order."""
        chosen, rejected = (self.group.rollouts[i] for i in (pair.chosen, pair.rejected))
        return derive_seed("certainty", self.group.prompt.id, chosen.seed, chosen.text, rejected.seed, rejected.text) / 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A part of some responses, that which they have in common behind the place where they part from others."""

    start: int
    """How many tokens come before it, of `Rollout.prefix_ids` and `token_ids` together: context of the step, like the prompt."""
    end: int
    """How many tokens end with it."""
    leaves: tuple[int, ...]
    """The responses of the group that it is part of; what it is worth is the mean over them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two responses of one judged group, the better one first."""

    chosen: int
    rejected: int
    prob: float
    """P(chosen beats rejected), within [0, 1]."""
    gap: float = 0.0
    """By how much it was chosen, in the units the builder selects by."""
    steps: tuple[Step, Step] | None = None
    """What of the two is trained, the better one first, where it is not all of them: `chosen` and `rejected` are then one of the leaves each."""
