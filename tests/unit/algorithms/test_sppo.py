from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, items_of, judged, pair, sequence, single, spread, values
from trl_losses import dpo_loss

from onlinerl.algorithms.sppo import Sppo

VARIANTS = [{}, {"pairs": "all"}]
KNOBS = {"eta": [({}, 10.0)], "pairs": [({}, "all")], "winrate_includes_self": [({}, False)]}
NAN = float("nan")
CYCLE = ((NAN, 0.9, 0.2), (0.1, NAN, 0.7), (0.8, 0.3, NAN))


def at_reference(items):
    return np.mean([(1000 * (s.win_rate - 0.5)) ** 2 for item in items for s in item.sequences])


def test_value_by_hand():
    items = [pair(sequence(3, win_rate=0.9), sequence(2, 50, win_rate=0.1))]
    assert evaluate(Sppo(), items, [0.0, 0.0])[0] == pytest.approx(160000, rel=1e-6)  # at the reference, with published knobs
    # D = (3, -1) against targets (4, -4)
    assert evaluate(Sppo(eta=10.0), items, [1.0, -0.5])[0] == pytest.approx((1.0 + 9.0) / 2, rel=1e-6)


def test_even_game_at_the_reference_has_no_loss_and_no_gradient():
    items = [single(sequence(3, reference_logprobs=-1.0, win_rate=0.5))]
    loss, gradient, _, _ = evaluate(Sppo(pairs="all"), items, [-1.0])
    assert loss == 0
    assert gradient.abs().max() == 0


def test_minimum_is_where_the_log_ratio_is_eta_times_the_centred_win_rate():
    # eta 10, win rate 0.75: target 2.5 nats over 5 tokens
    items = [single(sequence(5, reference_logprobs=-1.0, win_rate=0.75))]
    loss, gradient, _, _ = evaluate(Sppo(eta=10.0, pairs="all"), items, [-0.5])
    assert loss == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.75])
def test_gradient_at_the_reference_points_away_from_the_centred_win_rate(rate):
    _, gradient, _, _ = evaluate(Sppo(eta=100.0, pairs="all"), [single(sequence(2, win_rate=rate))], [0.0])
    assert gradient[0].tolist() == pytest.approx([-2 * 100.0 * (rate - 0.5)] * 2, rel=1e-6)


def test_best_and_worst_of_the_matrix_are_trained_with_their_own_win_rates():
    # Row means with the self term 1/2: (1.6, 1.3, 1.6) / 3; the first of the equal best ones is taken
    items = items_of(Sppo(), judged([1, 2, 3], preferences=CYCLE))
    assert len(items) == 1
    assert [len(s.response_ids) for s in items[0].sequences] == [1, 2]
    assert [s.win_rate for s in items[0].sequences] == pytest.approx([1.6 / 3, 1.3 / 3])
    assert items[0].prob == pytest.approx(0.9)


def test_the_matrix_is_not_rebuilt_from_scores():
    items = items_of(Sppo(pairs="all"), judged([1, 2, 3], preferences=CYCLE, scores=(9.0, 0.0, -9.0)))
    assert [item.sequences[0].win_rate for item in items] == pytest.approx([1.6 / 3, 1.3 / 3, 1.6 / 3])
    assert [item.sequences[0].score for item in items] == [9.0, 0.0, -9.0]


def test_without_itself_a_response_may_win_every_time():
    """Means of the two others: 1.1 / 2, 0.8 / 2 and 1.1 / 2."""
    apart = Sppo(pairs="all", winrate_includes_self=False)
    rates = [item.sequences[0].win_rate for item in items_of(apart, judged([1, 2, 3], preferences=CYCLE))]
    assert rates == pytest.approx([0.55, 0.4, 0.55])
    sure = judged([1, 2], preferences=((NAN, 1.0), (0.0, NAN)))
    (one,), (other,) = (items_of(Sppo(winrate_includes_self=own), sure) for own in (False, True))
    assert [s.win_rate for s in one.sequences] == pytest.approx([1.0, 0.0])
    assert [s.win_rate for s in other.sequences] == pytest.approx([0.75, 0.25])
    # The second was compared with the first only: 0.2, while the first has (0.8 + 0.6) / 2.
    some = judged([1, 2, 3], preferences=((NAN, 0.8, 0.6), (NAN, NAN, NAN), (NAN, NAN, NAN)))
    rates = [item.sequences[0].win_rate for item in items_of(apart, some)]
    assert rates == pytest.approx([0.7, 0.2, 0.4])
    assert apart.items(judged([1, 2, 3], scores=(1.0, 0.0, NAN), unjudged=(2,)), [])[1] == {"unjudged": 1}


def test_a_group_of_ties_still_holds_the_policy_to_the_reference():
    items = items_of(Sppo(), judged([1, 2, 3], scores=(1.0, 1.0, 1.0)))
    assert [len(s.response_ids) for s in items[0].sequences] == [1, 3]
    assert [s.win_rate for s in items[0].sequences] == [0.5, 0.5]


def test_one_response_has_nothing_to_win_against():
    assert Sppo().items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})
    assert Sppo(pairs="all").items(judged([1], scores=(1.0,)), []) == ([], {"single": 1})


def test_two_targets_for_one_response_are_counted():
    group = judged([1, 2, 1], scores=(1.0, 0.5, 0.0))
    twin = dataclasses.replace(group.group.rollouts[2], token_ids=group.group.rollouts[0].token_ids)
    group = dataclasses.replace(group, group=dataclasses.replace(group.group, rollouts=(*group.group.rollouts[:2], twin)))
    assert Sppo().items(group, []) == ([], {"identical": 1})


def test_all_has_one_item_per_response():
    assert [len(item.sequences) for item in items_of(Sppo(pairs="all"), judged([1, 2, 3], scores=(1.0, 0.0, 2.0)))] == [1, 1, 1]


def test_metrics_show_the_achieved_log_ratios():
    items = [pair(sequence(2, win_rate=0.75), sequence(4, 50, win_rate=0.25))]
    metrics = values(evaluate(Sppo(eta=100.0), items, [0.5, -0.5])[2])
    assert metrics["winner_log_ratio"] == pytest.approx(1.0)
    assert metrics["loser_log_ratio"] == pytest.approx(-2.0)
    assert metrics["target"] == pytest.approx(25.0)
    assert metrics["margin"] == pytest.approx(3.0)


def test_hard_labels_agree_with_trl_which_sums_the_two_squares():
    eta, lengths = 20.0, [(4, 2), (1, 6)]
    rng = np.random.default_rng(0)
    items = [
        pair(
            sequence(w, reference_logprobs=-rng.random(w), win_rate=1.0),
            sequence(n, 50, reference_logprobs=-rng.random(n), win_rate=0.0),
        )
        for w, n in lengths
    ]
    rows = [-2 * rng.random(n) for pair_lengths in lengths for n in pair_lengths]
    loss, gradient, _, batch = evaluate(Sppo(eta=eta), items, rows)
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    order = torch.tensor([0, 2, 1, 3])
    expected = dpo_loss(
        logprobs[order], batch.reference_logprobs_BT[order].double(), batch.mask_BT[order], beta=1 / eta, sppo_hard=1.0
    )
    assert loss == pytest.approx(expected.item() / 2, rel=1e-9)
    assert torch.allclose(gradient, torch.autograd.grad(expected / 2, logprobs)[0], atol=1e-9)
