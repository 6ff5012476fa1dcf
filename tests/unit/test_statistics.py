"""Error bars and divergences against values known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinerl.controller import statistics
from onlinerl.controller.statistics import bootstrap, decisive, divergence, ratio, wilson

# Wilson, 95 %: from the formula worked by hand for 8 of 10, and published tables for the others.
WILSON = [
    (8, 10, 0.4902, 0.9433),
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (15, 20, 0.5313, 0.8881),
    (50, 100, 0.4038, 0.5962),
    (88, 100, 0.8019, 0.9300),
]


@pytest.mark.parametrize(("wins", "n", "low", "high"), WILSON)
def test_wilson_against_known_values(wins, n, low, high):
    found = wilson([1.0] * wins + [0.0] * (n - wins))
    assert found.value == wins / n
    assert found.n == n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60))
def test_wilson_properties(wins):
    found, mirrored = wilson(wins), wilson([1 - w for w in wins])
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_the_interval_to_decide_by_knows_what_a_tie_is():
    """Of 400 results half of which are ties, Wilson's is 41 % too wide; without ties, and of a few, it is Wilson's."""
    tied = [0.5] * 200 + [1.0] * 100 + [0.0] * 100
    found, shown = decisive(tied), wilson(tied)
    assert (found.value, found.n) == (shown.value, shown.n) == (0.5, 400)
    assert (shown.high - shown.low) / (found.high - found.low) == pytest.approx(2**0.5, rel=0.08)
    for few in ([1.0] * 60 + [0.0] * 40, [0.5] * 29, [0.5, 0.0], []):
        assert repr(decisive(few)) == repr(wilson(few))


def test_the_interval_to_decide_by_covers_the_mean():
    """Of 300 at 95 %, between 91 % and 99 % hold the true win rate, where Wilson's holds it nearly always."""
    rng = np.random.default_rng(6)
    drawn = [rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.6, 0.2], size=100).tolist() for _ in range(300)]
    covers = [[found.low <= 0.5 <= found.high for found in map(of, drawn)] for of in (decisive, wilson)]
    assert 0.91 < np.mean(covers[0]) < 0.99
    assert np.mean(covers[1]) > 0.99


def test_nothing_was_measured():
    for found in (wilson([]), bootstrap([]), bootstrap([math.nan])):
        assert found.n == 0
        assert math.isnan(found.value)
        assert math.isnan(found.low)


def test_bootstrap_leaves_out_what_is_not_finite():
    found = bootstrap([1.0, math.nan, 3.0, math.inf])
    assert (found.value, found.n) == (2.0, 2)
    assert found.se == pytest.approx(1.0)


def test_bootstrap_of_one_value_has_no_error_bar():
    found = bootstrap([2.0])
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)
    assert math.isnan(found.se)


def test_bootstrap_is_repeatable():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values) == bootstrap(values)


def test_bootstrap_covers_the_mean():
    """Of 300 intervals at 95 %, between 90 % and 99 % hold the true mean (the percentile bootstrap runs a little narrow)."""
    rng = np.random.default_rng(1)
    found = [bootstrap(rng.exponential(size=50), draws=300, seed=i) for i in range(300)]
    assert 0.90 <= np.mean([e.low <= 1.0 <= e.high for e in found]) <= 0.99
    assert np.mean([e.se for e in found]) == pytest.approx(1 / math.sqrt(50), rel=0.1)


def test_a_ratio_weighs_every_token_alike():
    found = ratio([2.0, 9.0], [1, 3])
    assert found.value == pytest.approx(11 / 4)
    assert found.n == 4
    assert found.low == pytest.approx(2.0)
    assert found.high == pytest.approx(3.0)
    assert found == ratio([2.0, 9.0], [1, 3])
    for nothing in (ratio([], []), ratio([0.0], [0])):
        assert nothing.n == 0
        assert math.isnan(nothing.value)


# --- divergence ---


def test_a_model_does_not_differ_from_itself():
    logprobs = [np.array([-1.0, -2.0], np.float32), np.array([-0.5], np.float32), np.zeros(0, np.float32)]
    found = divergence(logprobs, logprobs)
    assert (found.k1.value, found.k3.value, found.k3.high, found.clamped) == (0, 0, 0, 0)


def test_lengths_must_match():
    with pytest.raises(ValueError, match="shorter"):
        divergence([np.zeros(2)], [])


def test_by_hand():
    """One sequence of two tokens: k1 = d1 + d2, k3 = sum of exp(-d) - 1 + d."""
    found = divergence([np.array([-1.0, -2.0])], [np.array([-1.5, -1.0])])
    assert found.k1.value == pytest.approx(0.5 - 1.0)
    assert found.k3.value == pytest.approx((math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1.0))


def test_absurd_ratios_are_clamped_and_counted():
    found = divergence([np.array([0.0, -1.0])], [np.array([-1000.0, -1.0])])
    assert found.clamped == 1
    assert found.k1.value == 20
    assert math.isfinite(found.k3.value)


def from_gaps(*rows: list[float]):
    """A divergence whose log-ratios are these."""
    return divergence([np.array(row) for row in rows], [np.zeros(len(row)) for row in rows])


def test_the_headline_is_the_estimate_with_less_noise_and_says_which():
    """k3 near the other model; k1 where tokens that the policy finds rare make k3 jump, or where ratios are clamped."""
    near = from_gaps([0.1, -0.1], [-0.2, 0.1], [0.1, 0.2])
    assert near.k3.se < near.k1.se
    assert (near.estimator, near.headline) == ("k3", near.k3)
    far = from_gaps([-4.0], [1.0], [2.0])
    assert far.k3.se > far.k1.se
    assert (far.estimator, far.headline) == ("k1", far.k1)
    few = from_gaps(*[[0.0] * 1000] * 2, [25.0] + [0.0] * 999)
    assert few.clamped_share == pytest.approx(1 / 3000)
    assert few.estimator == "k3"
    many = from_gaps(*[[25.0] + [0.0] * 99] * 3)
    assert many.clamped_share == pytest.approx(0.01)
    assert many.k3.se <= many.k1.se
    assert many.estimator == "k1"


def test_samples_of_another_model_give_a_conflict():
    """Both estimators hold for samples of the policy only; with samples of somebody else they part."""
    rng = np.random.default_rng(3)
    p, q, other = (np.log(np.exp(x) / np.exp(x).sum()) for x in 0.5 * rng.normal(size=(3, 8)))

    def seen(sampler):
        tokens = rng.choice(8, p=np.exp(sampler), size=(2000, 5))
        return divergence(list(p[tokens]), list(q[tokens]))

    assert not seen(p).conflict
    assert seen(q).conflict
    assert seen(other).conflict
    assert not from_gaps([0.0], [0.0]).conflict, "a model and itself"


logprob = st.floats(min_value=-30, max_value=0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(logprob, logprob), min_size=1, max_size=6), min_size=1, max_size=6))
def test_k3_is_never_negative(rows):
    found = divergence([np.array([p for p, _ in row]) for row in rows], [np.array([q for _, q in row]) for row in rows])
    assert found.k3.value >= 0
    assert found.k3.low >= 0


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.0])
def test_closed_form_on_a_tabular_policy(distance):
    """Sequences of 5 independent tokens: KL = 5 * sum p log(p / q). Both estimators are within three standard errors."""
    rng = np.random.default_rng(7)
    p, q = (np.log(np.exp(x) / np.exp(x).sum()) for x in (np.zeros(8), distance * rng.normal(size=8)))
    tokens = rng.choice(8, p=np.exp(p), size=(2000, 5))
    found = divergence(list(p[tokens]), list(q[tokens]))
    truth = 5 * float((np.exp(p) * (p - q)).sum())
    for estimate in (found.k1, found.k3):
        assert abs(estimate.value - truth) < 3 * estimate.se
        assert estimate.n == 2000
    assert found.k3.se < found.k1.se


def test_a_resample_does_not_depend_on_how_much_of_it_is_in_memory(monkeypatch):
    values = np.random.default_rng(1).normal(size=777)
    whole = bootstrap(values), ratio(values + 5, [3] * 777)
    monkeypatch.setattr(statistics, "_DRAWN_NUMBERS", 777 * 7)
    assert (bootstrap(values), ratio(values + 5, [3] * 777)) == whole
    drawn = np.random.default_rng(0).integers(0, 777, size=(1000, 777))
    assert whole[0].low == np.percentile(values[drawn].mean(axis=1), 2.5)
