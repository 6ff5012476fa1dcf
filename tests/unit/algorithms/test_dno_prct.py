from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithm_batches import MARGIN_KNOBS, evaluate, items_of, judged, pair, sequence

from onlinerl.algorithms.dno_prct import DnoPrct
from onlinerl.algorithms.dpo import Dpo
from onlinerl.types import Pair

VARIANTS = [{}, {"margin": -1.0, "floor": -10.0, "nll_coef": 0.1}, {"teacher": True, "margin": 0.3, "margin_student": 0.1}]
KNOBS = MARGIN_KNOBS | {
    "floor": [({}, 0.5)],
    "margin": [({}, 0.5)],
    "margin_student": [({}, 0.5)],
    "teacher": [({}, True)],
    "teacher_max_share": [({"teacher": True}, 0.0)],
    "teacher_decay": [],  # acts from the second iteration on: see test_fewer_from_one_iteration_to_the_next
    "teacher_min_percentile": [({"teacher": True, "teacher_max_share": 1.0}, 0.9)],
    "replay": [({}, 0.0)],
    "replay_decay": [({}, 1.0)],
    "replay_max_age": [({}, 1)],
    # Responses of the contracts repeat nothing: see the tests of degenerate ones.
    "ngram_repeats": [],
    "ngram_size": [],
}
PAIRS = [Pair(chosen=2, rejected=0, prob=0.9), Pair(chosen=2, rejected=1, prob=0.8), Pair(chosen=1, rejected=0, prob=0.7)]


def at_reference(items):
    return math.log(2)


def item(rate_1: float, rate_2: float, **changes):
    return pair(
        sequence(2, reference_logprobs=-1.0, win_rate=rate_1),
        sequence(4, 50, reference_logprobs=-1.0, win_rate=rate_2),
        **changes,
    )


def test_value_by_hand():
    # D_w = 2 (-0.5 + 1) = 1 and D_l = 4 (-1.5 + 1) = -2, so z = 0.3
    assert evaluate(DnoPrct(), [item(0.9, 0.1)], [-0.5, -1.5])[0] == pytest.approx(0.554355244, rel=1e-7)


def test_without_filters_is_dpo_against_the_previous_policy():
    group = judged([1, 2, 3], scores=(0.0, 1.0, 2.0))
    assert (
        [i.prob for i in items_of(DnoPrct(), group, PAIRS)]
        == [i.prob for i in items_of(Dpo(), group, PAIRS)]
        == [0.9, 0.8, 0.7]
    )
    assert DnoPrct().reference == "previous"
    for knobs in ({}, {"beta": 0.5, "label_smoothing": 0.2}):
        ours, theirs = (evaluate(cls(**knobs), [item(0.9, 0.1)], [-0.4, -1.3]) for cls in (DnoPrct, Dpo))
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("knobs", "kept", "counted"),
    [
        ({"floor": 5.0}, [0.9, 0.8], {"floor": 1}),  # the winner of the third pair scores 4
        ({"margin": 4.0}, [0.9, 0.7], {"gap": 1}),  # gaps are 3, 1 and 2, and of a student half is asked
        ({"floor": 5.0, "margin": 4.0}, [0.9], {"floor": 1, "gap": 1}),
        ({"floor": 5.5}, [], {"floor": 3}),
    ],
)
def test_filters_by_the_oracles_scores_and_counts(knobs, kept, counted):
    items, dropped = DnoPrct(**knobs).items(judged([1, 2, 3], scores=(2.0, 4.0, 5.0)), PAIRS)
    assert ([i.prob for i in items], dropped) == (kept, counted)


def test_filters_by_win_rates_where_the_oracle_gives_no_scores():
    even = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.1), (0.5, 0.9, 0.5))
    items, _ = DnoPrct(margin=0.4).items(judged([1, 2, 3], preferences=even), PAIRS)
    assert [i.prob for i in items] == [0.8]  # win rates 0.5, 0.3667 and 0.6333


def of_teacher(scores, teacher=0):
    return judged([2] * len(scores), {teacher: "teacher"}, scores=tuple(scores))


def ranked(scores):
    """All pairs, the better one first."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [Pair(chosen=i, rejected=j, prob=0.5 + 0.01 * (10 * i + j)) for n, i in enumerate(order) for j in order[n + 1 :]]


def places(items):
    return [tuple(s.response_ids[0] // 10 - 1 for s in item.sequences) for item in items]


def test_a_student_wins_by_less_than_the_teacher_must():
    """Scores 6, 5, 4 and 2 of a teacher and three students: the paper's numbers."""
    algorithm = DnoPrct(floor=5.0, margin=2.0, margin_student=1.0)
    items, dropped = algorithm.items(of_teacher([6.0, 5.0, 4.0, 2.0]), ranked([6.0, 5.0, 4.0, 2.0]))
    assert places(items) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert dropped == {"gap": 1, "floor": 1}
    behind, _ = algorithm.items(of_teacher([4.0, 5.0]), ranked([4.0, 5.0]))
    assert places(behind) == [(1, 0)], "a student may win against the teacher"
    assert algorithm.figures([*items, *behind]) == {"teacher_won": 2.0, "teacher_lost": 1.0, "among_students": 2.0}


@pytest.mark.parametrize(("margin", "asked"), [(2.0, 1.0), (3.0, 1.5), (None, None)])
def test_of_a_student_half_of_the_margin_is_asked_as_in_the_paper(margin, asked):
    scores = [6.0, 5.0, 4.0, 2.0]
    ours, theirs = (
        DnoPrct(margin=margin, margin_student=student).items(of_teacher(scores), ranked(scores)) for student in (None, asked)
    )
    assert (places(ours[0]), ours[1]) == (places(theirs[0]), theirs[1])


def test_an_answer_of_the_teacher_was_sampled_by_nobody():
    (item, *_), _ = DnoPrct().items(of_teacher([6.0, 5.0]), ranked([6.0, 5.0]))
    teacher, student = item.sequences
    assert (teacher.policy_version, teacher.behavior_logprobs, student.policy_version) == (None, None, 3)


def repeating(*, teacher: bool = False):
    """Three responses: (1, 2, 1, 2, 1), (3, 4, 5) and (6, 6, 6), with scores 9, 5 and 1."""
    from dataclasses import replace

    group = judged([1, 1, 1], {0: "teacher"} if teacher else {}, scores=(9.0, 5.0, 1.0))
    tokens = ((1, 2, 1, 2, 1), (3, 4, 5), (6, 6, 6))
    rollouts = tuple(
        replace(r, token_ids=ids, logprobs=(-1.0,) * len(ids)) for r, ids in zip(group.group.rollouts, tokens, strict=True)
    )
    return replace(group, group=replace(group.group, rollouts=rollouts))


def test_a_degenerate_sample_loses_whatever_the_oracle_says():
    algorithm = DnoPrct(ngram_size=1, ngram_repeats=3, floor=4.0, margin=100.0)
    items, dropped = algorithm.items(repeating(), ranked([9.0, 5.0, 1.0]))
    assert [[tuple(s.response_ids) for s in item.sequences] for item in items] == [
        [(3, 4, 5), (1, 2, 1, 2, 1)],  # turned round
        [(3, 4, 5), (6, 6, 6)],  # as it was, and by less than the margin
    ]
    assert [item.prob for item in items] == pytest.approx([1 - 0.51, 0.62])
    assert dropped == {"degenerate": 1}
    assert DnoPrct(ngram_size=1, ngram_repeats=3, floor=6.0).items(repeating(), ranked([9.0, 5.0, 1.0]))[0] == [], (
        "too bad to win"
    )


@pytest.mark.parametrize(
    ("knobs", "degenerate"),
    [
        ({"ngram_size": 1, "ngram_repeats": 3}, [True, False, True]),
        ({"ngram_size": 2, "ngram_repeats": 2}, [True, False, True]),
        ({"ngram_size": 2, "ngram_repeats": 3}, [False, False, False]),
        ({"ngram_repeats": None}, [False, False, False]),
        ({}, [False, False, False]),
    ],
)
def test_what_is_degenerate(knobs, degenerate):
    from onlinerl.ops.items import train_sequences

    found = train_sequences(repeating())
    assert [DnoPrct(**knobs).degenerate(found[k]) for k in range(3)] == degenerate
    teacher = train_sequences(repeating(teacher=True))[0]
    assert not DnoPrct(**knobs).degenerate(teacher), "a teacher's answer is taken as it is"


def test_shares_of_earlier_pairs_fall_with_their_age():
    assert DnoPrct().needs.replay == (0.3, 0.15, 0.075)
    assert DnoPrct(replay=0.0).needs.replay == ()
    assert (DnoPrct().needs.answers, DnoPrct(teacher=True).needs.beside_samples) == (False, ("teacher",))


@pytest.mark.parametrize(
    "knobs",
    [
        {"ngram_repeats": None, "ngram_size": 3},
        {"replay": 0.0, "replay_decay": 0.9},
        {"replay": 0.0, "replay_max_age": 1},
        {"teacher_max_share": 0.5},
        {"teacher_decay": 1.0},
        {"teacher_min_percentile": 0.0},
    ],
)
def test_what_nothing_would_read_is_refused(knobs):
    with pytest.raises(ValueError, match="nothing reads it"):
        DnoPrct(**knobs)


def taught(n: int, *, won: bool = True, logprob: float = -1.0, iteration: int = 1, **own):
    """A pair of the teacher's answer, with such a log-prob per token under the reference, and a sample of the policy."""
    teacher = sequence(3, 100 + n, reference_logprobs=logprob, source="teacher")
    sample = sequence(2, 1000 + 10 * n, reference_logprobs=own.get("own", -1.0))
    two = (teacher, sample) if won else (sample, teacher)
    return pair(*two, iteration=iteration)


def among_samples(n: int, iteration: int = 1, logprobs=(-1.0, -1.0)):
    first, second = (sequence(2, 2000 + 20 * n + 10 * k, reference_logprobs=lp) for k, lp in enumerate(logprobs))
    return pair(first, second, iteration=iteration)


def test_the_teachers_answer_is_chosen_only_if_it_is_as_probable_as_the_policys_own_responses():
    """Own samples have -1, -2, ..., -20 nats per token, and those beside the teacher -1, -2 and -3 once more: 23 of them, of which the 5th
    percentile is 0.05 * 22 = 1.1 places from the lowest, -18.9."""
    own = [among_samples(n, logprobs=(-1.0 - 2 * n, -2.0 - 2 * n)) for n in range(10)]
    teacher = [
        taught(0, logprob=-18.8, own=-1.0),
        taught(1, logprob=-19.0, own=-2.0),
        taught(2, logprob=-30.0, won=False, own=-3.0),  # on the other side it may be as improbable as it likes
    ]
    algorithm = DnoPrct(teacher=True, teacher_max_share=1.0, teacher_decay=1.0)
    items = [*own, *teacher]
    assert algorithm.select(items) == ([*range(11), 12], {"teacher_unlikely": 1})
    free = DnoPrct(teacher=True, teacher_max_share=1.0, teacher_decay=1.0, teacher_min_percentile=0.0)
    assert free.select(items) == (list(range(13)), {})
    bare = [pair(*(s.with_(reference_logprobs=None) for s in item.sequences)) for item in items]
    with pytest.raises(ValueError, match=r"sequence\.reference_logprobs"):
        algorithm.select(bare)
    assert len(free.select(bare)[0]) == 13


@pytest.mark.parametrize(("iteration", "kept"), [(1, 3), (2, 1), (3, 0)])
def test_fewer_from_one_iteration_to_the_next(iteration, kept):
    """0.3, 0.15 and 0.075 of all pairs, beside 7 without the teacher: 3 of 10, 1 of 8, and 1 of 8 would be more than 0.075."""
    items = [*(among_samples(n, iteration) for n in range(7)), *(taught(n, iteration=iteration) for n in range(5))]
    algorithm = DnoPrct(teacher=True, teacher_min_percentile=0.0)
    places, dropped = algorithm.select(items)
    assert list(places[:7]) == list(range(7))
    assert len(places) == 7 + kept
    assert dropped == {"teacher_share": 5 - kept}
    always = DnoPrct(teacher=True, teacher_min_percentile=0.0, teacher_decay=1.0)
    assert len(always.select(items)[0]) == 10


def test_which_pairs_of_the_teacher_stay_depends_on_the_pairs_alone():
    items = [*(among_samples(n) for n in range(7)), *(taught(n, won=n % 2 == 0) for n in range(6))]
    algorithm = DnoPrct(teacher=True, teacher_min_percentile=0.0)

    def left(order):
        return {items[order[place]].sequences[0].response_ids for place in algorithm.select([items[n] for n in order])[0]}

    order = list(np.random.default_rng(0).permutation(len(items)))
    assert left(order) == left(list(range(len(items))))


def test_without_a_share_there_is_no_teacher():
    none = DnoPrct(teacher=True, teacher_max_share=0.0)
    assert none.needs == DnoPrct().needs
    assert DnoPrct(teacher=True).needs.beside_samples == ("teacher",)


def test_without_a_reference_nobody_says_how_probable_an_answer_is():
    with pytest.raises(ValueError, match="reference_free is set"):
        DnoPrct(teacher=True, reference_free=True)
    assert DnoPrct(teacher=True, reference_free=True, teacher_min_percentile=0.0).needs.teacher
    assert not DnoPrct(reference_free=True).needs.reference


def test_a_replayed_pair_of_the_teacher_counts_towards_the_share_of_the_iteration_that_trains_it():
    items = [*(among_samples(n, 2) for n in range(7)), taught(0, iteration=2), taught(1, iteration=1), taught(2, iteration=1)]
    _, dropped = DnoPrct(teacher=True, teacher_min_percentile=0.0).select(items)
    assert dropped == {"teacher_share": 2}
