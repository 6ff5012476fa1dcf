from __future__ import annotations

import math

import numpy as np
import pytest
from algorithm_batches import evaluate, items_of, judged, pair, sequence, single, values

from onlinerl.algorithms.gpo_preference import GpoPreference
from onlinerl.algorithms.sppo import Sppo

VARIANTS = [{}, {"pairs": "all"}]
KNOBS = {
    "beta": [({}, 0.01)],
    "tau": [({}, 0.3)],
    "prob_clip": [],  # of oracles that say probabilities only, see below
    "score_clip": [({}, 0.05)],
    "pairs": [({}, "all")],
}
NAN = float("nan")
CYCLE = ((NAN, 0.9, 0.2), (0.1, NAN, 0.7), (0.8, 0.3, NAN))


def at_reference(items):
    return np.mean([(s.advantages[0] / 0.001) ** 2 for item in items for s in item.sequences])


def scores_of(algorithm: GpoPreference, group) -> list[float]:
    return [float(item.sequences[0].advantages[0]) for item in items_of(algorithm, group)]


def test_value_by_hand():
    items = [pair(sequence(3, advantages=0.2), sequence(2, 50, advantages=-0.1))]
    # at the reference, with published knobs: targets (200, -100)
    assert evaluate(GpoPreference(), items, [0.0, 0.0])[0] == pytest.approx(25000, rel=1e-6)
    # beta 0.05: D = (3, -1) against targets (4, -2)
    assert evaluate(GpoPreference(beta=0.05), items, [1.0, -0.5])[0] == pytest.approx((1.0 + 1.0) / 2, rel=1e-6)


def test_score_is_the_scaled_logit_of_each_probability_and_its_mean_has_the_self_term():
    # Log-odds of 0.9, 0.7 and 0.8: 2.19722, 0.84730 and 1.38629. The first: 0.1 (2.19722 - 1.38629 + 0) / 3, and so on.
    got = scores_of(GpoPreference(pairs="all"), judged([1, 2, 3], preferences=CYCLE))
    assert got == pytest.approx([0.0270310, -0.0449975, 0.0179665], abs=1e-6)


def test_best_and_worst_are_those_of_the_mean_score_and_not_of_the_win_rate():
    # The first wins once for sure and loses twice narrowly: win rate 0.52, log-odds 3.89182 - 2 * 0.84730 = 2.19722. The third has the
    # highest win rate, 0.525, and log-odds of 0.84730 - 0.40547 only. The second is the worst by both: 2 * 0.40547 - 3.89182 = -3.08089.
    matrix = ((NAN, 0.98, 0.3, 0.3), (0.02, NAN, 0.6, 0.6), (0.7, 0.4, NAN, 0.5), (0.7, 0.4, 0.5, NAN))
    group = judged([1, 2, 3, 4], preferences=matrix)
    assert [s.response_ids[0] for s in items_of(Sppo(), group)[0].sequences] == [30, 20]
    (item,) = items_of(GpoPreference(), group)
    assert [s.response_ids[0] for s in item.sequences] == [10, 20]
    assert [float(s.advantages[0]) for s in item.sequences] == pytest.approx([0.0549306, -0.0770222], abs=1e-6)
    assert item.prob == pytest.approx(0.98)


def test_scores_of_a_group_sum_to_zero():
    rng = np.random.default_rng(0)
    matrix = rng.random((5, 5))
    np.fill_diagonal(matrix, np.nan)
    for verdict in ({"preferences": tuple(map(tuple, matrix.tolist()))}, {"scores": tuple(rng.standard_normal(5) * 3)}):
        group = judged([1, 2, 3, 4, 5], **verdict)
        standings = GpoPreference().standings(group)
        assert standings.sum() == pytest.approx(0, abs=1e-12)
        assert np.abs(standings).max() > 0.01


def test_scores_of_an_oracle_that_only_scores_are_the_differences_of_its_scores():
    # At the oracle's temperature of tau, s(i, j) = r_i - r_j; here (0.3, 0.1, -0.05) less their mean 0.35 / 3.
    group = judged([1, 2, 3], scores=(0.3, 0.1, -0.05), temperature=0.1)
    assert scores_of(GpoPreference(pairs="all"), group) == pytest.approx([0.1833333, -0.0166667, -0.1666667], abs=1e-6)


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        # A circle: each beats the next by as much as it loses to the one before.
        ([(0.3, 0.0), (-0.15, 0.2598076), (-0.15, -0.2598076)], [0.0, 0.0, 0.0]),
        # s(1, 2) = 0.5 * 0.4 - 0 * 0.1 = 0.2, s(1, 3) = 0.5 * 0 - 0 * 0.2 = 0, s(2, 3) = 0.1 * 0 - 0.4 * 0.2 = -0.08
        ([(0.5, 0.0), (0.1, 0.4), (0.2, 0.0)], [0.0666667, -0.0933333, 0.0266667]),
        # (r, 1) is Bradley-Terry: r_1 - r_2 and so on
        ([(0.3, 1.0), (0.1, 1.0), (-0.05, 1.0)], [0.1833333, -0.0166667, -0.1666667]),
    ],
    ids=["circle", "plane", "bradley-terry"],
)
def test_scores_of_the_paper_s_preference_model_come_back(embeddings, expected):
    """With two numbers per response s(i, j) = v_i[0] v_j[1] - v_i[1] v_j[0], and P = sigmoid(s / tau)."""
    skew = [[v[0] * w[1] - v[1] * w[0] for w in embeddings] for v in embeddings]
    matrix = tuple(tuple(1 / (1 + math.exp(-s / 0.1)) for s in row) for row in skew)
    got = GpoPreference(prob_clip=1e-6).standings(judged([1, 2, 3], preferences=matrix))
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_certain_preference_counts_as_far_as_the_clip():
    group = judged([1, 2], preferences=((NAN, 1.0), (0.0, NAN)))
    for clip in (0.02, 0.2):  # half of it, because of the self term
        expected = 0.05 * math.log((1 - clip) / clip)
        assert scores_of(GpoPreference(pairs="all", prob_clip=clip), group) == pytest.approx([expected, -expected], rel=1e-6)


@pytest.mark.parametrize(
    "verdict",
    [
        {"scores": (6.0, 0.0)},
        {"preferences": ((NAN, 0.99999), (0.0001, NAN)), "log_odds": ((NAN, 7.0), (-5.0, NAN))},  # of both orders 6
    ],
    ids=["scores", "log-odds"],
)
def test_what_an_oracle_says_itself_is_not_bounded_by_its_probabilities(verdict):
    """0.1 * 6, and half of it because of the self term, where 0.98 would be 0.1 * 3.89; `score_clip` is another bound."""
    group = judged([1, 2], **verdict)
    for clip, expected in ((1.0, 0.3), (0.4, 0.2), (0.05, 0.025)):
        assert scores_of(GpoPreference(pairs="all", score_clip=clip), group) == pytest.approx([expected, -expected], rel=1e-6)
    assert scores_of(GpoPreference(pairs="all", prob_clip=0.4), group) == pytest.approx([0.3, -0.3], rel=1e-6)


def test_the_largest_score_of_an_iteration_is_reported():
    items = [pair(sequence(3, advantages=0.2), sequence(2, 50, advantages=-0.3)), single(sequence(0))]
    assert GpoPreference().figures(items) == {"preference_score_max": pytest.approx(0.3)}
    assert GpoPreference().figures([]) == {"preference_score_max": 0.0}


def test_a_response_that_was_not_judged_is_left_out():
    group = judged([1, 2, 3], preferences=((NAN, 0.9, NAN), (0.1, NAN, NAN), (NAN, NAN, NAN)))
    items, dropped = GpoPreference(pairs="all").items(group, [])
    assert dropped == {"unjudged": 1}
    assert [float(i.sequences[0].advantages[0]) for i in items] == pytest.approx([0.109861, -0.109861], abs=1e-6)
    assert GpoPreference().items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})


def test_even_game_at_the_reference_has_no_loss_and_no_gradient():
    (item,) = items_of(GpoPreference(), judged([1, 2], preferences=((NAN, 0.5), (0.5, NAN))))
    item = pair(*(sequence(3, reference_logprobs=-1.0, advantages=s.advantages[0]) for s in item.sequences))
    loss, gradient, _, _ = evaluate(GpoPreference(), [item], [-1.0, -1.0])
    assert loss == 0
    assert gradient.abs().max() == 0


def test_minimum_is_where_the_log_ratio_is_the_score_over_beta():
    # beta 0.1, score 0.25: target 2.5 nats over 5 tokens
    items = [single(sequence(5, reference_logprobs=-1.0, advantages=0.25))]
    loss, gradient, _, _ = evaluate(GpoPreference(beta=0.1, pairs="all"), items, [-0.5])
    assert loss == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() == pytest.approx(0, abs=1e-6)


def test_an_empty_response_is_asked_for_nothing():
    items = [single(sequence(0)), single(sequence(2, advantages=0.1))]
    _, _, out, _ = evaluate(GpoPreference(pairs="all"), items, [0.0, 0.0])
    assert out.total.item() == pytest.approx(10000)
    assert values(out)["target"] == pytest.approx(100)


def test_scores_are_read():
    with pytest.raises(ValueError, match="advantages_BT"):
        evaluate(GpoPreference(), [pair(sequence(1).with_(advantages=None), sequence(1, 50))], [0.0, 0.0])
