"""Figures of reward and preference models: on numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onlinerl.controller import accuracy
from onlinerl.controller.accuracy import Scored, calibration, cycle_rate, cycles, measured, outcomes
from onlinerl.reward_training.refresh import worse


def scored(prob: float, *, label: float = 1.0, chosen: int = 5, rejected: int = 5, source: str = "a", **more) -> Scored:
    return Scored(prob=prob, label=label, chosen_length=chosen, rejected_length=rejected, source=source, **more)


def test_a_perfect_model_a_reversed_one_and_one_that_says_nothing():
    for prob, expected, ece in ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0)):
        found = measured([scored(prob)] * 300)
        assert found["accuracy"]["value"] == expected
        assert found["calibration"]["ece"] == pytest.approx(ece)
    assert measured([scored(1.0)] * 300)["accuracy"]["low"] > 0.98


def test_ties_are_counted_and_have_no_winner():
    found = measured([scored(0.9), scored(0.2, label=0.5), scored(0.8, label=0.7)])
    assert (found["comparisons"], found["ties"], found["accuracy"]["n"], found["accuracy"]["value"]) == (3, 1, 2, 1.0)


def test_calibration_by_hand():
    """200 comparisons in two bins: confidence 0.6 with 70 of 100 right, 0.9 with 80 of 100 right."""
    probs = [0.6] * 70 + [0.4] * 30 + [0.9] * 80 + [0.1] * 20
    right = [1.0] * 70 + [0.0] * 30 + [1.0] * 80 + [0.0] * 20
    found = calibration(probs, right)
    assert found["bins"] == 2
    assert found["ece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    assert 0 < found["floor"] < found["floor_95"]
    assert found == calibration(probs, right), "the same draws"


@pytest.mark.parametrize(("count", "bins"), [(50, 1), (499, 4), (5000, 15)])
def test_so_many_bins(count, bins):
    assert calibration([0.7] * count, [1.0] * count)["bins"] == bins


def test_the_noise_floor_is_what_a_calibrated_model_has():
    """Labels drawn from the model's own probabilities: about the floor; a model twice as sure: far above it."""
    rng = np.random.default_rng(3)
    odds = rng.normal(size=2000)
    probs = 1 / (1 + np.exp(-odds))
    wins = rng.random(2000) < probs
    fair = calibration(probs, np.where(wins, probs > 0.5, probs < 0.5).astype(float))
    assert not fair["alarm"]
    assert 0.005 < fair["floor"] < 0.04
    assert fair["ece"] < 2 * fair["floor"]
    sure = 1 / (1 + np.exp(-3 * odds))
    assert calibration(sure, np.where(wins, sure > 0.5, sure < 0.5).astype(float))["alarm"]


def test_by_length_and_source():
    rows = [scored(0.9, chosen=n, rejected=n, source="b" if n % 2 else "a") for n in range(1, 9)]
    rows += [scored(0.1, chosen=100, rejected=100, source="a"), scored(0.1, chosen=100, rejected=101, source="a")]
    found = measured(rows)
    assert [part["n"] for part in found["accuracy_by_length"]] == [3, 3, 2, 2]
    assert [part["value"] for part in found["accuracy_by_length"]] == [1.0, 1.0, 1.0, 0.0]
    assert (found["accuracy_by_length"][0]["from"], found["accuracy_by_length"][-1]["to"]) == (2, 201)
    assert {name: part["n"] for name, part in found["accuracy_by_source"].items()} == {"a": 6, "b": 4}


def test_a_model_that_likes_length():
    """It prefers the longer one, whatever is better."""
    rows = [scored(0.9, chosen=9, rejected=4)] * 10 + [scored(0.1, chosen=4, rejected=9)] * 10
    found = measured(rows)["length_bias"]
    assert (found["longer_is_better"]["value"], found["shorter_is_better"]["value"], found["difference"]) == (1.0, 0.0, -1.0)


def table(*wins: tuple[int, int], size: int) -> np.ndarray:
    found = np.full((size, size), 0.5)
    for i, j in wins:
        found[i, j], found[j, i] = 0.9, 0.1
    return found


def test_cycle_rates():
    assert cycle_rate(table((0, 1), (1, 2), (2, 0), size=3)) == 1.0
    assert cycle_rate(table((0, 1), (1, 2), (0, 2), size=3)) == 0.0
    # A circle of three, all of which beat the fourth: one triple of four.
    assert cycle_rate(table((0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3), size=4)) == 0.25
    scores = np.random.default_rng(0).normal(size=9)
    assert cycle_rate(1 / (1 + np.exp(-np.subtract.outer(scores, scores)))) == 0.0
    coins = [cycle_rate(np.full((5, 5), 0.5), str(i)) for i in range(300)]
    assert np.mean(coins) == pytest.approx(0.25, abs=0.03)
    assert coins[0] == cycle_rate(np.full((5, 5), 0.5), "0"), "a coin falls the same way again"


def test_cycles_of_several_prompts():
    circle, order = table((0, 1), (1, 2), (2, 0), size=3), table((0, 1), (1, 2), (0, 2), size=3)
    half = order.copy()
    half[0, 2] = half[2, 0] = math.nan
    found = cycles({"a": circle, "b": order, "c": order}, {"a": circle, "b": order, "c": half})
    assert found["model"]["value"] == pytest.approx(1 / 3)
    assert found["model"]["n"] == found["triples"] == 3
    assert (found["data"]["value"], found["data"]["n"]) == (0.5, 2)
    assert cycles({}, {}) is None


def test_disagreement_of_the_two_orders():
    found = measured([scored(0.9, disagrees=True), scored(0.9, disagrees=False)])
    assert found["swap_disagreement"]["value"] == 0.5
    assert "swap_disagreement" not in measured([scored(0.9)])


def test_warnings():
    chance = measured([scored(0.9)] * 11 + [scored(0.1)] * 10)
    assert any("includes chance" in each for each in accuracy.warnings(chance))
    worse = measured([scored(0.9)] * 100 + [scored(0.1, source="b")] * 20)
    assert any("of b it is wrong more often than right" in each for each in accuracy.warnings(worse))
    sure = measured([scored(0.999)] * 200 + [scored(0.001)] * 100)
    assert any("calibration error" in each for each in accuracy.warnings(sure))
    assert accuracy.warnings(measured([scored(0.99)] * 297 + [scored(0.01)] * 3)) == []


def test_nothing_to_measure():
    found = measured([scored(0.9, label=0.5)])
    assert found["ties"] == 1
    assert math.isnan(found["accuracy"]["value"])
    assert found["accuracy_by_length"] == []


# --- whether a model that was trained further is worse ---


def asked(*right: float) -> dict:
    rows = [scored({1.0: 0.9, 0.5: 0.5, 0.0: 0.1}[each]) for each in right]
    return measured(rows) | {"outcomes": outcomes(rows)}


def test_a_fall_that_chance_explains_is_no_reason_to_reject():
    """12 lost and 8 won of 100, by 4 points; 12 lost and none won, by 12."""
    before = asked(*[1.0] * 60, *[0.0] * 40)
    chance, sure = asked(*[0.0] * 12, *[1.0] * 56, *[0.0] * 32), asked(*[0.0] * 12, *[1.0] * 48, *[0.0] * 40)
    assert worse(before, chance, 0.02) is None
    assert "fell from 0.600 to 0.480, by more than 0.02, and by 0.0" in worse(before, sure, 0.02)
    assert worse(before, sure, 0.2) is None
    assert worse(sure, before, 0.0) is None
    assert worse(asked(), asked(), 0.0) is None


def test_the_same_comparisons_are_compared():
    """Both accuracies have wide intervals that overlap, and none of 200 comparisons was gained: what was lost was not lost by chance."""
    before, after = asked(*[1.0] * 110, *[0.0] * 90), asked(*[1.0] * 100, *[0.5] * 10, *[0.0] * 90)
    assert after["accuracy"]["high"] > before["accuracy"]["low"]
    assert worse(before, after, 0.02) is not None


def test_of_older_figures_any_fall_counts():
    before = {"accuracy": asked(1.0, 1.0)["accuracy"]}
    assert worse(before, asked(1.0, 0.5), 0.02).endswith("fell from 1.000 to 0.750, by more than 0.02")


def test_ties_in_the_data_have_no_outcome():
    assert outcomes([scored(0.9), scored(0.2, label=0.5), scored(0.5), scored(0.2)]) == [1.0, 0.5, 0.0]
