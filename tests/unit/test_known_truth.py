"""Oracles whose verdict follows from the texts alone: similarity to a reference answer, and truths that were made up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onlinerl.config import component
from onlinerl.errors import ConfigError, OracleError
from onlinerl.oracles.ref_similarity import chrf, longest_common
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Prompt, Query


def ask(oracle: Oracle, *responses: str, answer: str | None = None):
    prompt = Prompt(id="p", text="what ", token_ids=(1,), reference_answer=answer)
    (result,) = oracle.ask([Query(prompt=prompt, responses=responses)])
    return result


def built(name: str, **knobs) -> Oracle:
    return component({"name": name, **knobs}, "oracle", "oracles", Oracle)


# --- similarity ---


@pytest.mark.parametrize(
    ("metric", "response", "answer", "score"),
    [
        ("token_f1", "the cat sat", "The CAT sat", 1.0),
        ("token_f1", "sat the cat", "the cat sat", 1.0),
        ("token_f1", "the the cat", "the cat sat down", 4 / 7),  # two in common, of three and four
        ("token_f1", "dog", "cat", 0.0),
        ("token_f1", "", "cat", 0.0),
        ("token_f1", "", "", 1.0),
        ("rouge_l", "sat the cat", "the cat sat", 2 / 3),
        ("rouge_l", "police killed the gunman", "police kill the gunman", 3 / 4),  # the example of the paper
        ("rouge_l", "the gunman kill police", "police kill the gunman", 2 / 4),
        ("chrf", "abc", "abc", 1.0),
        ("chrf", "ab c", "abc", 1.0),
        ("chrf", "ab", "ac", (5 * 1 / (4 * 2 + 2) + 0) / 2),  # one of two characters, no two in a row
        ("chrf", "", "abc", 0.0),
    ],
)
def test_similarity_by_hand(metric, response, answer, score):
    assert ask(built("ref_similarity", metric=metric), response, answer=answer).scores == (pytest.approx(score),)


@pytest.mark.parametrize("metric", ["token_f1", "rouge_l", "chrf"])
def test_the_answer_itself_is_the_maximum(metric):
    answer = "It rains, and the sun shines."
    verdict = ask(built("ref_similarity", metric=metric), answer, answer + " Often.", "It rains", "no", "", answer=answer)
    assert verdict.scores[0] == 1.0
    assert max(verdict.scores[1:]) < 1.0


def test_symmetric_metrics_are_symmetric():
    for metric in ("token_f1", "rouge_l"):
        oracle = built("ref_similarity", metric=metric)
        assert ask(oracle, "a b c a", answer="b a d").scores == ask(oracle, "b a d", answer="a b c a").scores
    assert chrf("abcdef", "abc") != chrf("abc", "abcdef"), "recall counts more"
    assert longest_common([], ["a"]) == 0


def test_of_several_answers_the_nearest_counts():
    oracle = built("ref_similarity", metric="token_f1")
    assert ask(oracle, "yes", "no", "maybe", answer='["yes", "no"]').scores == (1.0, 1.0, 0.0)
    assert ask(oracle, "[1, 2]", answer="[1, 2]").scores == (1.0,), "what is no list of texts is the answer itself"


def test_what_is_longer_than_the_answer_may_cost_something():
    oracle = built("ref_similarity", metric="token_f1", len_ratio_penalty=0.1)
    assert ask(oracle, "a b", "a b c d", "a", answer="a b").scores == pytest.approx((1.0, 4 / 6 - 0.1, 2 / 3))


def test_a_prompt_without_an_answer_stops_the_run():
    with pytest.raises(OracleError, match="no reference answer"):
        ask(built("ref_similarity"), "x")


# --- synthetic ---


def test_a_known_utility():
    verdict = ask(
        built("synthetic", utility={"words": {"good": 2.0, "bad": -1.0}, "per_word": 0.5}), "Good, good film", "bad", ""
    )
    assert verdict.scores == (5.5, -0.5, 0.0)
    assert verdict.matrix()[1, 2] == pytest.approx(1 / (1 + math.exp(0.5)))


def test_preferences_that_go_in_a_circle():
    oracle = built("synthetic", cycle=["paper", "rock", "scissors"], cycle_strength=0.8)
    verdict = ask(oracle, "a rock", "Paper beats rock", "scissors", "nothing", "a rock too")
    assert verdict.scores is None
    matrix = verdict.matrix()
    assert matrix[1, 0] == matrix[0, 2] == matrix[2, 1] == pytest.approx(0.8)
    assert matrix[0, 4] == 0.5
    np.testing.assert_allclose(matrix[:3, 3], 0.8)
    np.testing.assert_allclose(ask(oracle, "rock", "paper", "scissors").win_rates(), 0.5)
    five = ask(built("synthetic", cycle=["a", "b", "c", "d", "e"]), "a", "c").matrix()
    assert five[0, 1] == 0.5


def test_a_population_is_no_member_of_itself():
    """Two thirds want a, one third wants b ten times as much: most prefer a, and the mean utility says b."""
    groups = {"many": {"share": 2 / 3, "words": {"a": 3.0}}, "few": {"share": 1 / 3, "words": {"b": 30.0}}}
    verdict = ask(built("synthetic", population=groups), "a", "b")
    wanted = 2 / 3 / (1 + math.exp(-3)) + 1 / 3 / (1 + math.exp(30))
    assert verdict.matrix()[0, 1] == pytest.approx(wanted)
    assert verdict.components == {"many": (3.0, 0.0), "few": (0.0, 30.0)}


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ({}, "oracle.utility"),
        ({"utility": {"per_word": 1.0}, "cycle": ["a", "b", "c"]}, "oracle.cycle"),
        ({"cycle": ["a", "b"]}, "oracle.cycle"),
        ({"cycle": ["a", "b", "a"]}, "oracle.cycle"),
        ({"population": {"x": {"share": 0.5}}}, "oracle.population"),
        ({"population": {"x": {"share": 1.0, "wrds": {}}}}, "oracle.population.x.wrds"),
        ({"cycle": ["a", "b", "c"], "cycle_strength": 0.4}, "oracle.cycle_strength"),
    ],
)
def test_a_truth_that_cannot_be_meant_is_refused(knobs, field):
    with pytest.raises(ConfigError) as error:
        built("synthetic", **knobs)
    assert error.value.field == field
