"""What all pair builders start from: the distinct responses of a judged group, best first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from onlinerl.errors import OracleError
from onlinerl.types import Judged, Pair, derive_seed


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The distinct responses of one group. Every array is indexed by position in the group (length K)."""

    order: tuple[int, ...]
    """Indices of the distinct responses that were judged, best first. Equals are ordered by a hash of their text."""
    distinct: int
    """How many distinct responses there are, judged or not."""
    quality: np.ndarray
    """f64[K], what responses are compared by: win rate, or score; NaN for a response that was not judged."""
    matrix: np.ndarray
    """f64[K, K], P(i beats j); NaN where unknown."""

    def lost(self) -> Counter[str]:
        """How many of the K(K-1)/2 pairs are gone because a response repeats another (`identical`) or was not judged (`unknown`)."""
        distinct_pairs, judged_pairs = comb(self.distinct, 2), comb(len(self.order), 2)
        lost = Counter(identical=comb(len(self.quality), 2) - distinct_pairs, unknown=distinct_pairs - judged_pairs)
        return +lost  # without zeros

    def none(self) -> Counter[str]:
        """Why there is nobody to compare with: `single` (K is 1), `identical` or `unknown`; empty if there is."""
        if len(self.order) >= 2:
            return Counter()
        return Counter({"single" if len(self.quality) < 2 else "identical" if self.distinct < 2 else "unknown": 1})


def by_preference(judged: Judged) -> Candidates:
    """Compare by win rate if the oracle returned preferences, by score otherwise (E1).

    Win rates are taken over the distinct responses: a response sampled five times is not five opponents (E11).

    Raises:
        OracleError: if the verdict does not fit the group or holds a number that is not finite.
    """
    if judged.verdict.preferences is None:
        return by_score(judged)
    distinct = _distinct(judged)
    matrix = judged.verdict.matrix()
    _check(judged, matrix.shape, matrix[~np.isnan(matrix)])
    among = matrix[np.ix_(distinct, distinct)]
    # The diagonal is always known: a response that was compared with no other has no win rate, not one of 0.5.
    compared = [index for index, row in zip(distinct, among, strict=True) if np.isfinite(row).sum() > 1]
    quality = np.full(len(matrix), np.nan)
    # Rounded: the mean of the same numbers in another order differs in the last bits, and a tie must stay a tie.
    quality[distinct] = np.round(np.nanmean(among, axis=1), 9)
    quality[[index for index in distinct if index not in compared]] = np.nan
    return Candidates(order=_ranked(judged, compared, quality), distinct=len(distinct), quality=quality, matrix=matrix)


def by_score(judged: Judged) -> Candidates:
    """Compare by the oracle's score.

    Raises:
        OracleError: if there are no scores, they do not fit the group, or one is not finite.
    """
    if judged.verdict.scores is None:
        raise OracleError(
            f"{judged.verdict.annotator} returns preferences without scores, which this pair builder needs",
            field="pairing.name",
            fix="choose best_worst, all_pairs or ranked, which also compare by win rate",
        )
    quality = np.asarray(judged.verdict.scores, dtype=np.float64)
    _check(judged, quality.shape, np.delete(quality, judged.verdict.unjudged))
    distinct, matrix, said = _distinct(judged), judged.verdict.matrix(), judged.verdict.judged()
    order = _ranked(judged, [index for index in distinct if said[index]], quality)
    return Candidates(order=order, distinct=len(distinct), quality=quality, matrix=matrix)


def select(
    candidates: Candidates, proposals: Sequence[tuple[int, int]], min_gap: float = 0.0, *, ties: str = "drop"
) -> tuple[list[Pair], Counter[str]]:
    """Turn (better, worse) index pairs into pairs whose gap exceeds `min_gap`; count the others by reason.

    Reasons: `tie` (no gap at all), `gap` (a gap, but not above `min_gap`), `unknown` (no probability for this pair). With `ties: soft`, and no
    `min_gap`, responses without a gap are a pair with the probability 1/2.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for better, worse in proposals:
        gap = float(candidates.quality[better] - candidates.quality[worse])
        prob = float(candidates.matrix[better, worse])
        if gap <= 0 and ties == "soft" and min_gap == 0:
            pairs.append(Pair(chosen=better, rejected=worse, prob=0.5, gap=0.0))
        elif gap <= 0:
            dropped["tie"] += 1
        elif gap <= min_gap:
            dropped["gap"] += 1
        elif np.isnan(prob):
            dropped["unknown"] += 1
        else:
            pairs.append(Pair(chosen=better, rejected=worse, prob=prob, gap=gap))
    return pairs, dropped


def _head(token_ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(token_ids[:16])


def _distinct(judged: Judged) -> list[int]:
    """One index per distinct response. Of equals, the one with the smallest seed stays, so that position does not matter."""
    rollouts = judged.group.rollouts
    if len({rollout.text for rollout in rollouts}) == len({_head(rollout.token_ids) for rollout in rollouts}) == len(rollouts):
        return list(range(len(rollouts)))  # as nearly always, which their first tokens show
    ids = [np.asarray(rollout.token_ids, ">i8").tobytes() for rollout in rollouts]  # in the order of the numbers
    texts: set[str] = set()
    tokens: set[bytes] = set()
    kept: list[int] = []
    for index in sorted(range(len(rollouts)), key=lambda i: (rollouts[i].seed, rollouts[i].text, ids[i])):
        text = rollouts[index].text
        if text not in texts and ids[index] not in tokens:
            kept.append(index)
        texts.add(text)
        tokens.add(ids[index])
    return sorted(kept)


def _ranked(judged: Judged, distinct: Sequence[int], quality: np.ndarray) -> tuple[int, ...]:
    texts = [rollout.text for rollout in judged.group.rollouts]
    if len({*quality[list(distinct)].tolist()}) == len(distinct):  # no equals: nothing to hash
        return tuple(sorted(distinct, key=lambda i: -quality[i]))
    return tuple(sorted(distinct, key=lambda i: (-quality[i], derive_seed(texts[i]), texts[i])))


def _check(judged: Judged, shape: tuple[int, ...], values: np.ndarray) -> None:
    count = len(judged.group.rollouts)
    if set(shape) != {count}:
        raise OracleError(
            f"{judged.verdict.annotator} judged {shape[0]} responses to prompt {judged.group.prompt.id!r}, which has {count}",
            field="oracle.name",
            fix="return one score (or one row of preferences) per response",
        )
    if not np.isfinite(values).all():
        raise OracleError(
            f"{judged.verdict.annotator} gave prompt {judged.group.prompt.id!r} a number that is not finite",
            field="oracle.name",
            fix="return a Failure where there is no judgement",
        )
