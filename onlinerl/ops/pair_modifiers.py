"""What pairs and other items count beside one another, what is imitated beside pairs, and what their tokens count. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import numpy as np

from onlinerl.types.training import TrainItem, TrainSequence, Unit

if TYPE_CHECKING:
    from onlinerl.types.labels import Judged


def normalized(
    weights: Iterable[float], clip: Sequence[float] | None = None, counts: Sequence[float] | None = None
) -> list[float]:
    """Divided by their mean, so that it becomes 1; all 0 if that is 0.

    Args:
        weights: one for each item, not negative.
        clip: the lowest and the highest weight, in units of the mean. What is cut off moves the mean, so it is divided by that once more.
        counts: of how many units each item is, that the mean is over; one each by default.
    """
    given = list(weights)
    if clip is not None:
        lowest, highest = clip
        given = [min(max(w, lowest), highest) for w in normalized(given, counts=counts)]
    units = [1] * len(given) if counts is None else counts
    total = math.fsum(w * n for w, n in zip(given, units, strict=True))
    return [w * sum(units) / total for w in given] if total > 0 else [0.0] * len(given)


def weighed(
    items: Sequence[TrainItem], kind: str, clip: Sequence[float] | None, unit: Unit, age_decay: float = 0.5
) -> Iterator[TrainItem]:
    """Items of any loss with what they count beside one another, times what they count already.

    The mean over all units of the iteration is 1, so weights do not depend on how it is cut into steps, ranks and micro-batches, and leave the
    size of the loss as it is.

    Args:
        items: of an iteration.
        kind: `certainty`, `score_gap`, `per_prompt` or `age`, see `training.sample_weights`.
        clip: see `normalized`.
        unit: what the loss is a mean over.
        age_decay: see `by_age`.
    """
    if kind == "age":
        raw = by_age(items, age_decay)
    else:
        raw = by_prompt(items) if kind == "per_prompt" else [_gap(item, kind) for item in items]
    scaled = normalized(raw, clip, [item.count(unit) for item in items])
    return (replace(item, weight=item.weight * weight) for item, weight in zip(items, scaled, strict=True))


def _gap(item: TrainItem, kind: str) -> float:
    """Between the best and the worst response of an item; of a single one twice that to a win rate of 1/2."""
    if len(item.sequences) == 1:
        return abs(2.0 * item.sequences[0].win_rate - 1.0)
    values = [s.score if kind == "score_gap" else s.win_rate for s in item.sequences]
    return max(values) - min(values)


def weighed_pairs(items: Sequence[TrainItem], raw: Iterable[float], clip: Sequence[float] | None) -> Iterator[TrainItem]:
    """Pairs with these weights, divided by their mean (see `normalized`), in the place of what they count so far."""
    return (replace(item, weight=weight) for item, weight in zip(items, normalized(raw, clip), strict=True))


def raw_weights(
    items: Sequence[TrainItem], kind: str, thresholds: Sequence[float], age_decay: float, source_weights: Mapping[str, float]
) -> list[float]:
    """What pairs of an iteration count, one for each, as the algorithms' `pair_weights` says; `dcg` has put it into the items."""
    if kind == "age":
        return by_age(items, age_decay)
    if kind == "source":
        return by_source(items, source_weights)
    if kind == "per_prompt":
        return by_prompt(items)
    if kind == "strength":
        return [1.0 + sum(_score_gap(item) >= least for least in thresholds) for item in items]
    if kind == "score_gap":
        return [max(0.0, _score_gap(item)) for item in items]
    return [max(0.0, 2 * item.prob - 1 if kind == "certainty" else item.weight) for item in items]


def _score_gap(pair: TrainItem) -> float:
    return pair.sequences[0].score - pair.sequences[1].score


def by_age(items: Iterable[TrainItem], decay: float) -> list[float]:
    """decay^a, a by how many iterations an item is older than the newest ones."""
    sampled = [item.iteration for item in items]
    return [decay ** (max(sampled) - t) for t in sampled]


def by_source(items: Iterable[TrainItem], counts: Mapping[str, float]) -> list[float]:
    """What both responses of a pair count by their source, times what `replay` counts if the pair is older than the newest ones; 1 each where
    `counts` does not say."""
    found = [(item.iteration, [sequence.source for sequence in item.sequences[:2]]) for item in items]
    newest = max(iteration for iteration, _ in found)
    return [
        math.prod(counts.get(source, 1.0) for source in [*sources, *(["replay"] if iteration < newest else [])])
        for iteration, sources in found
    ]


def by_prompt(items: Iterable[TrainItem]) -> list[float]:
    """1 over the number of pairs of the same prompt in the same iteration, so that each prompt counts as much as any other."""
    prompts = [(item.iteration, item.prompt_id) for item in items]
    pairs = Counter(prompts)
    return [1.0 / pairs[prompt] for prompt in prompts]


def with_dcg(items: Sequence[TrainItem], judged: Judged) -> list[TrainItem]:
    """Pairs of one group, each with what swapping its two responses changes in the DCG of the group's ranking:
    |2^r_w - 2^r_l| |1 / ln(1 + rank_w) - 1 / ln(1 + rank_l)|, r the win rates within the group; of equal ones all have the best rank.

    "LiPO: Listwise Preference Optimization through Learning-to-Rank" (arXiv 2402.01878), with ranks by the oracle, for those of the
    policy are not known of a pair alone.
    """
    known = [rate for rate in judged.verdict.win_rates().tolist() if not math.isnan(rate)]

    def discount(rate: float) -> float:
        return 1.0 / math.log(2.0 + sum(other > rate for other in known))

    rates = [[s.win_rate for s in item.sequences[:2]] for item in items]
    return [
        replace(item, weight=abs(2.0**won - 2.0**lost) * abs(discount(won) - discount(lost)))
        for item, (won, lost) in zip(items, rates, strict=True)
    ]


def with_answer(item: TrainItem, judged: Judged) -> TrainItem:
    """The pair with the stored answer to its prompt, which is imitated: a sequence more, unless it is one of the two.

    Raises:
        ValueError: if the prompt carries no answer.
    """
    prompt = judged.group.prompt
    if not prompt.answer_ids:
        raise ValueError(f"prompt {prompt.id!r} carries no answer_ids; declare `answers` in the algorithm's `needs`")
    answer = TrainSequence(prompt_ids=prompt.token_ids, response_ids=prompt.answer_ids, policy_version=None, source="teacher")
    places = (n for n, s in enumerate(item.sequences) if s.prompt_ids == answer.prompt_ids)
    same = next((n for n in places if tuple(item.sequences[n].response_ids) == prompt.answer_ids), None)
    if same is not None:
        return replace(item, nll=same)
    return replace(item, sequences=(*item.sequences, answer), nll=len(item.sequences))


def pooled(items: Iterable[TrainItem], prepared: Iterable[TrainItem]) -> Iterator[TrainItem]:
    """`prepared` with the mean length of what is imitated, over `items`: divided by that, log-probs have the same mean as over all those tokens.

    It is that of the whole iteration, as weights are, so that no item depends on which others are in its step.
    """
    lengths = [len(item.sequences[item.nll or 0].response_ids) for item in items]
    mean = max(1.0, sum(lengths) / len(lengths))
    return (replace(item, nll_tokens=mean) for item in prepared)


def differing(item: TrainItem, common: float) -> TrainItem:
    """The pair with a weight for each token: 1 where the two responses differ, `common` where they say the same. All tokens of what else the
    item holds count 1."""
    chosen, rejected, *others = item.sequences
    weights = apart(chosen.response_ids, rejected.response_ids, common)
    two = tuple(s.with_(token_weights=w) for s, w in zip((chosen, rejected), weights, strict=True))
    rest = tuple(s.with_(token_weights=np.ones(len(s.response_ids), np.float32)) for s in others)
    return replace(item, sequences=two + rest)


def apart(one: Sequence[int], other: Sequence[int], common: float) -> tuple[np.ndarray, np.ndarray]:
    """f32[T] and f32[U], `common` for tokens in blocks that both have in the same order, as `difflib` matches them, and 1 for the others.

    In responses of 200 tokens and more, tokens that make up over 1% of one begin no block, or long ones would take seconds to compare; such a
    token is common where it lies next to a block.
    """
    ours, theirs = np.ones(len(one), np.float32), np.ones(len(other), np.float32)
    # Numbers of numpy would be hashed and compared one by one, several times slower.
    for at, there, size in SequenceMatcher(None, list(map(int, one)), list(map(int, other))).get_matching_blocks():
        ours[at : at + size] = common
        theirs[there : there + size] = common
    return ours, theirs
