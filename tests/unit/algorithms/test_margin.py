"""What may modify any loss of a margin, each by hand and each off by default."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, ROWS, evaluate, pair, sequence, values
from torch import Tensor

from onlinerl import registry
from onlinerl.algorithms._margin import Margin
from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.algorithms.dpo import Dpo
from onlinerl.ops.batching import collate
from onlinerl.ops.terms import beyond_the_shorter
from onlinerl.protocols.algorithm import Algorithm


def f(z: float) -> float:
    return math.log1p(math.exp(-z))


@pytest.mark.parametrize(
    ("knobs", "z"),
    [
        ({"reference_free": True}, 0.1 * (-2 + 5)),
        ({"ld_alpha": 1.0}, 0.3),
        # Two of the four chosen tokens, 0.5 each, are beyond the two rejected ones.
        ({"ld_alpha": 0.5}, 0.1 * (1 + 0.5 * 1 + 1)),
        ({"ld_alpha": 0.0, "reference_free": True}, 0.1 * (-1 + 5)),
        ({"length_norm": True}, 0.1 * (0.5 + 0.5)),
        ({"ld_alpha": 0.0, "length_norm": True}, 0.1 * (0.25 + 0.5)),  # lengths stay
        ({"beta_rejected": 0.04}, 0.1 * 2 + 0.04),
        ({"gamma_beta_ratio": 2.0}, 0.3 - 0.2),
        ({"score_margin": 0.2}, 0.3 - 0.2 * (1.5 - 0.5)),
        ({"score_margin": 0.2, "score_margin_max": 0.1}, 0.3 - 0.1),
        ({"score_margin": 0.2, "score_margin_max": 0.4}, 0.3 - 0.2),
        ({"dpop_lambda": 5.0}, 0.3),  # the chosen response did not lose
        ({"length_penalty": 0.05}, 0.3 + 0.05 * 2),
        ({"margin_cap": 0.2}, 0.2),
        ({"margin_cap": 0.4}, 0.3),
        ({"gamma_beta_ratio": 1.0, "length_penalty": 0.1, "score_margin": 0.1}, 0.3 - 0.1 + 0.2 - 0.1),
    ],
)
def test_what_moves_the_margin(knobs, z):
    assert evaluate(Dpo(**knobs), [ITEM], ROWS)[0] == pytest.approx(f(z), rel=1e-6)


def test_scores_that_contradict_the_label_add_to_the_margin_unless_it_is_bounded():
    contradicted = pair(*(s.with_(score=-s.score) for s in ITEM.sequences))
    assert evaluate(Dpo(score_margin=0.2), [contradicted], ROWS)[0] == pytest.approx(f(0.3 + 0.2), rel=1e-6)
    assert evaluate(Dpo(score_margin=0.2, score_margin_max=3.0), [contradicted], ROWS)[0] == pytest.approx(f(0.3), rel=1e-6)


def test_a_chosen_response_that_lost_probability_counts_against_the_pair():
    # D_w = 4 (-1.5 + 1) = -2 and D_l = -5: h = 3, less 5 times 2
    loss, gradient, _, _ = evaluate(Dpo(dpop_lambda=5.0), [ITEM], [-1.5, -4.5])
    assert loss == pytest.approx(f(0.1 * (3 - 10)), rel=1e-6)
    assert gradient[0, 0] / gradient[1, 0] == pytest.approx(-6.0)


@pytest.mark.parametrize(
    ("knobs", "right"),
    [
        ({"label_smoothing": 0.1}, 0.9),
        ({"soft_labels": True}, 0.8),
        ({"soft_labels": True, "label_smoothing": 0.1}, 0.74),
        ({"flip_rate": 0.1, "margin_cap": 9.0}, 0.9 / 0.8),
        ({"soft_labels": True, "flip_rate": 0.1, "margin_cap": 9.0}, 0.7 / 0.8),
        ({"soft_labels": True, "label_smoothing": 0.1, "flip_rate": 0.1, "margin_cap": 9.0}, 0.64 / 0.8),
    ],
)
def test_what_moves_the_label(knobs, right):
    assert evaluate(Dpo(**knobs), [ITEM], ROWS)[0] == pytest.approx(right * f(0.3) + (1 - right) * f(-0.3), rel=1e-6)


def test_everything_switched_off_is_the_loss_itself_to_the_bit():
    off = {"ld_alpha": 1.0, "beta_rejected": 0.1, "margin_cap": 1e9, "pair_weights": "equal"}
    one, other = evaluate(Dpo(), [ITEM], ROWS), evaluate(Dpo(**off), [ITEM], ROWS)
    assert one[0] == other[0] == pytest.approx(F_PLUS)
    assert torch.equal(one[1], other[1])


def weights(**knobs) -> list[float]:
    items = [
        pair(sequence(2, score=3.0), sequence(2, 50, score=0.0), prob=0.95),
        pair(sequence(2, score=1.0), sequence(2, 50, score=0.0), prob=0.75),
        pair(sequence(2, score=0.0), sequence(2, 50, score=1.0), prob=0.5),  # the scores contradict the label
    ]
    return [item.weight for item in Dpo(**knobs).prepare(items)]


def test_weights_of_pairs_have_mean_1_over_the_iteration():
    assert weights() == [1.0, 1.0, 1.0]
    assert weights(pair_weights="score_gap") == pytest.approx([3 * 3 / 4, 3 * 1 / 4, 0.0])
    assert weights(pair_weights="certainty") == pytest.approx([3 * 0.9 / 1.4, 3 * 0.5 / 1.4, 0.0])


def test_pairs_without_any_gap_teach_nothing():
    even = [pair(sequence(2), sequence(2, 50)) for _ in range(2)]
    assert [item.weight for item in Dpo(pair_weights="score_gap").prepare(even)] == [0.0, 0.0]


def collisions(*rows: list[float]) -> Tensor:
    """Of `ITEM`, padded to four tokens."""
    return torch.tensor([row + [float("nan")] * (4 - len(row)) for row in rows], dtype=torch.float64)


def test_a_pair_that_the_policy_would_not_say_counts_less():
    # lp - log sum pi^2 is -0.2, 0.2, -0.4, 0 (mean -0.1) and -0.5, -0.3 (mean -0.4): the weight is exp(-0.5) = 0.606531
    collision_BT = collisions([-0.3, -0.7, -0.1, -0.5], [-2.0, -2.2])
    loss, gradient, out, _ = evaluate(Dpo(pair_weights="wpo", nll_coef=2.0), [ITEM], ROWS, collision_BT=collision_BT)
    assert loss == pytest.approx(0.606531 * (F_PLUS + 2.0 * 0.5), rel=1e-6)
    assert values(out)["pair_weight"] == pytest.approx(0.606531, rel=1e-6)
    plain = evaluate(Dpo(nll_coef=2.0), [ITEM], ROWS)[1]
    assert torch.allclose(gradient, 0.606531 * plain, rtol=1e-6)  # nothing flows through the weight
    halved = [replace(ITEM, weight=0.5)]
    assert evaluate(Dpo(pair_weights="wpo", nll_coef=2.0), halved, ROWS, collision_BT=collision_BT)[0] == pytest.approx(
        loss / 2
    )


def test_no_pair_counts_more_than_one_of_the_policy_s_own_samples():
    # +1 per chosen token, -0.2 per rejected one: exp(0.8), cut off at 1. It is the product that is, not its factors: exp(1 - 3) stays.
    at = {"cut off": collisions([-1.5] * 4, [-2.3] * 2), "product": collisions([-1.5] * 4, [0.5] * 2)}
    losses = {
        name: evaluate(Dpo(pair_weights="wpo"), [ITEM], ROWS, collision_BT=collision_BT)[0] for name, collision_BT in at.items()
    }
    assert losses == {"cut off": pytest.approx(F_PLUS), "product": pytest.approx(0.135335 * F_PLUS, rel=1e-5)}


PAIRWISE = [n for n in registry.names("algorithms") if issubclass(registry.load("algorithms", n, Algorithm), Pairwise)]


@pytest.mark.parametrize("name", sorted({*PAIRWISE} - {"optune"}))  # which has weights of its own
def test_every_loss_on_pairs_can_be_weighed_like_that(name):
    plain, weighed = (registry.load("algorithms", name, Algorithm)(pair_weights=how) for how in ("equal", "wpo"))
    assert (plain.needs.collision, weighed.needs.collision) == (False, True)
    assert weighed.needs == replace(plain.needs, collision=True)
    assert weighed.loss_at_reference is None
    assert list(weighed.prepare([ITEM])) == [ITEM]


@pytest.mark.parametrize(
    ("knobs", "loss"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.1, "ld_alpha": 0.3, "dpop_lambda": 2.0, "beta_rejected": 0.01}, math.log(2)),
        ({"flip_rate": 0.1, "margin_cap": 5.0}, math.log(2)),
        ({"gamma_beta_ratio": 1.0}, None),
        ({"score_margin": 1.0}, None),
        ({"length_penalty": -0.1}, None),
        ({"reference_free": True}, None),
        ({"nll_coef": 0.1}, None),
        ({"pair_weights": "score_gap"}, None),
    ],
)
def test_the_self_test_knows_the_loss_only_where_the_formula_fixes_it(knobs, loss):
    known = Dpo(**knobs).loss_at_reference
    assert known == (None if loss is None else pytest.approx(loss))
    at_reference = evaluate(Dpo(**knobs), [ITEM], [-1.0, -2.0])[0]
    assert loss is None or at_reference == pytest.approx(loss)


@pytest.mark.parametrize(
    "name", [n for n in registry.names("algorithms") if issubclass(registry.load("algorithms", n, Algorithm), Margin)]
)
def test_swapping_chosen_and_rejected_flips_the_slope_at_zero_margin(name):
    algorithm = registry.load("algorithms", name, Algorithm)(gamma_beta_ratio=0.0, nll_coef=0.0, label_smoothing=0.1)
    one, other = sequence(3, reference_logprobs=-1.0), sequence(3, 50, reference_logprobs=-1.0)
    third = [sequence(3, 80, reference_logprobs=-1.0)] if algorithm.needs.beside_samples else []  # what is explored is no side
    items = [pair(*sides, *third, exploration=2 if third else None) for sides in ((one, other), (other, one))]
    slopes = [evaluate(algorithm, [item], [-1.0] * len(item.sequences))[1][:2] for item in items]
    assert slopes[0].abs().max() > 0
    if algorithm.beta_rejected is None:
        assert torch.allclose(slopes[0][0], -slopes[0][1], atol=1e-12)
    assert torch.allclose(slopes[0], slopes[1], atol=1e-12)  # chosen first, whichever it is


def test_only_tokens_beyond_the_shorter_response_of_their_own_pair():
    batch = collate([ITEM, pair(sequence(1), sequence(3, 50))])
    assert beyond_the_shorter(batch).tolist() == [
        [False, False, True, True],
        [False, False, True, True],
        [False, True, True, True],
        [False, True, True, True],
    ]
