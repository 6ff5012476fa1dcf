"""What a judgement says: probabilities, win rates, and nothing about what was not judged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onlinerl import config as configuration
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Verdict
from onlinerl.types.labels import disagreement

NAN = math.nan


def scored(*scores: float, **more) -> Verdict:
    return Verdict(annotator="a", oracle_version="v", scores=scores, **more)


def compared(*rows: tuple[float, ...], **more) -> Verdict:
    return Verdict(annotator="a", oracle_version="v", preferences=rows, **more)


@pytest.mark.parametrize(
    ("temperature", "prob"), [(1.0, 0.7310585786), (0.2, 0.9933071491), (0.5, 0.8807970780), (4.0, 0.5621765009)]
)
def test_scores_become_probabilities_at_their_temperature(temperature, prob):
    """sigmoid(1 / temperature)."""
    verdict = scored(1.0, 0.0, temperature=temperature)
    assert verdict.matrix()[0, 1] == pytest.approx(prob, abs=1e-10)
    assert verdict.matrix()[1, 0] == pytest.approx(1 - prob, abs=1e-10)
    assert verdict.win_rates() == pytest.approx([(0.5 + prob) / 2, (1.5 - prob) / 2], abs=1e-10)


def test_comparisons_have_no_temperature():
    rows = ((NAN, 0.8), (0.3, NAN))
    assert compared(*rows, temperature=0.1).matrix()[0, 1] == pytest.approx(0.75)  # (0.8 + 1 - 0.3) / 2


def test_for_a_verifier_right_is_better_than_wrong_almost_surely():
    oracle = configuration.component({"name": "math_verifier"}, "oracle", "oracles", Oracle)
    assert scored(1.0, 0.0, temperature=oracle.preference_temperature).matrix()[0, 1] > 0.99


def test_a_temperature_is_positive():
    with pytest.raises(Exception, match="preference_temperature"):
        configuration.component({"name": "sentiment", "preference_temperature": 0.0}, "oracle", "oracles", Oracle)


def test_a_response_that_nobody_judged_has_no_win_rate():
    # The second was compared with nobody; the first and the third once, in one order.
    verdict = compared((NAN, NAN, 0.9), (NAN, NAN, NAN), (NAN, NAN, NAN))
    assert verdict.judged().tolist() == [True, False, True]
    rates = verdict.win_rates()
    assert np.isnan(rates).tolist() == [False, True, False]
    assert rates[[0, 2]] == pytest.approx([0.7, 0.3])  # with the 1/2 against itself


def test_what_is_judged():
    assert scored(1.0, 0.0).judged().tolist() == [True, True]
    assert scored(1.0, NAN).judged().tolist() == [True, False]
    assert np.isnan(scored(1.0, NAN).win_rates()).tolist() == [False, True]
    assert compared((NAN,)).judged().tolist() == [False]
    assert scored(1.0).judged().tolist() == [True]
    both = compared((NAN, 0.5, NAN), (0.5, NAN, NAN), (NAN, NAN, NAN), scores=(1.0, 2.0, 3.0))
    assert both.judged().tolist() == [True, True, False]  # scored, but compared with nobody


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"raw": {"words": "good"}}, "parse_fail"),
        ({"cost": None}, "parse_fail"),
        ({"strength": ((1.0,),)}, "wrong_length"),
        ({"uncertainty": ((0.1,),)}, "wrong_length"),
        ({"uncertainty": ((0.0, 0.7), (0.7, 0.0))}, "non_finite"),  # more than log 2
        ({"components": {"harm": (1.0,)}}, "wrong_length"),
        ({"components": {"harm": (1.0, NAN)}}, "non_finite"),
        ({"components": {"Harm": (1.0, 0.0)}}, "parse_fail"),
        ({"components": {"score": (1.0, 0.0)}}, "parse_fail"),
        ({"components": {"kl": (1.0, 0.0)}}, "parse_fail"),
        ({"log_odds": ((1.0,),)}, "wrong_length"),
        ({"log_odds": ((NAN, 1.0), (1.0, NAN))}, "non_finite"),
        ({"unjudged": (1,)}, "non_finite"),
    ],
)
def test_what_could_not_be_stored_is_no_verdict(more, kind):
    """A class of the user's own makes Verdicts as it likes: what is wrong is found when it answers, and costs its group only."""
    problem = scored(1.0, 0.0, **more).problem(2)
    assert problem is not None
    assert problem.kind == kind
    more = {"uncertainty": ((0.0, NAN), (NAN, 0.0)), "components": {"harm": (0.0, 2.0)}}
    fine = scored(1.0, 0.0, raw="good", strength=((NAN, 1.0), (NAN, NAN)), **more)
    assert fine.problem(2) is None


def test_disagreement_by_hand():
    """Of 1 and 0 it is log 2, of equals 0; of 0.9 and 0.5 H(0.7) - (H(0.9) + H(0.5)) / 2 = 0.610864 - (0.325083 + 0.693147) / 2."""
    members = np.array(
        [[[0.5, 1.0, 0.9], [0.0, 0.5, NAN], [0.1, 0.8, 0.5]], [[0.5, 0.0, 0.5], [1.0, 0.5, 0.4], [0.5, 0.8, 0.5]]]
    )
    nats = disagreement(members)
    assert nats[0] == pytest.approx([0.0, np.log(2), 0.101749], abs=1e-6)
    assert np.allclose(nats[:, 0], nats[0], atol=1e-12), "whoever is shown first"
    assert np.isnan(nats[1, 2])
    assert nats[2, 1] == 0


def test_log_odds_lose_what_the_place_adds_and_are_divided_by_the_temperature():
    """L_raw = gap + bias in both orders."""
    odds = ((NAN, 2.0 + 0.7), (-2.0 + 0.7, NAN))
    probs = tuple(tuple(1 / (1 + math.exp(-x)) for x in row) for row in odds)
    assert compared(*probs, log_odds=odds).matrix()[0, 1] == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert compared(*probs, log_odds=odds, temperature=4.0).matrix()[0, 1] == pytest.approx(1 / (1 + math.exp(-0.5)))
    one_order = compared((NAN, probs[0][1]), (NAN, NAN), log_odds=((NAN, 2.7), (NAN, NAN)))
    assert one_order.matrix()[1, 0] == pytest.approx(1 / (1 + math.exp(2.7)))


@pytest.mark.parametrize(("rule", "expected"), [("average", 0.6), ("tie", 0.5), ("drop", NAN)])
def test_orders_that_name_different_winners(rule, expected):
    rows = ((NAN, 0.9, 0.9), (0.7, NAN, 0.5), (0.2, 1.0, NAN))
    verdict = compared(*rows, on_disagree=rule)
    assert verdict.disagreements().tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert verdict.matrix()[0, 1] == pytest.approx(expected, nan_ok=True)
    assert verdict.matrix()[0, 2] == pytest.approx(0.85)
    assert verdict.matrix()[1, 2] == pytest.approx(0.25), "a tie in one order contradicts nothing"


def test_log_odds_are_those_of_the_probabilities_and_keep_what_those_lose():
    """(2 - -1) / 2 = 1.5 of both orders over a temperature of 0.5; 100 nats, at which a probability is 1; a certain one is infinite."""
    given = compared((NAN, 0.88), (0.27, NAN), log_odds=((NAN, 2.0), (-1.0, NAN)), temperature=0.5)
    assert given.odds() == pytest.approx(np.array([[0.0, 3.0], [-3.0, 0.0]]))
    assert scored(50.0, 0.0, temperature=0.5).odds()[0, 1] == pytest.approx(100.0)
    assert compared((NAN, 1.0), (0.0, NAN)).odds().tolist() == [[0.0, math.inf], [-math.inf, 0.0]]
    part = compared((NAN, 0.9, NAN), (NAN, NAN, NAN), (NAN, NAN, NAN)).odds()
    assert (part[0, 1], part[1, 0]) == (pytest.approx(math.log(9)), pytest.approx(-math.log(9)))
    assert np.isnan([part[0, 2], part[2, 1]]).all()
    for verdict in (given, scored(0.7, -0.2, 0.1, temperature=2.0), compared((NAN, 0.9), (0.3, NAN))):
        assert 1 / (1 + np.exp(-verdict.odds())) == pytest.approx(verdict.matrix())
    with pytest.raises(ValueError, match="needs scores or preferences"):
        Verdict(annotator="a", oracle_version="v").odds()


@pytest.mark.parametrize(("rule", "expected"), [("average", 0.5), ("tie", 0.0), ("drop", NAN)])
def test_log_odds_of_orders_that_name_different_winners(rule, expected):
    """Log-odds of 2 and 1 for whoever is shown first: (2 - 1) / 2."""
    odds = compared((NAN, 0.88), (0.73, NAN), log_odds=((NAN, 2.0), (1.0, NAN)), on_disagree=rule).odds()
    assert odds[0, 1] == pytest.approx(expected, nan_ok=True)


def test_a_response_without_a_score_is_said_to_be_so():
    fine = scored(1.0, NAN, unjudged=(1,))
    assert fine.problem(2) is None
    assert fine.judged().tolist() == [True, False]
    for wrong in (scored(1.0, NAN), scored(1.0, 2.0, unjudged=(1,)), scored(NAN, NAN, unjudged=(1,))):
        assert wrong.problem(2) is not None
