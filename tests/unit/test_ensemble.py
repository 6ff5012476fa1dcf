"""Ensembles, noise and the two orders of the responses, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onlinerl.config import component
from onlinerl.errors import ConfigError, OracleError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Prompt, Query, Verdict


def query(*responses: str, name: str = "p") -> Query:
    return Query(prompt=Prompt(id=name, text="what ", token_ids=(1,)), responses=responses)


class Digits(Oracle):
    """The number at one place of each response, times a scale; `!` fails."""

    place: int = 0
    scale: float = 1.0

    @property
    def version(self):
        return f"digits-{self.place}-{self.scale}"

    def judge(self, queries):
        return [self.one(query) for query in queries]

    def one(self, query):
        said = [response.split()[self.place] for response in query.responses]
        if "!" in said:
            return Failure(kind="refused", message="met a !", cost=Cost(calls=1))
        scores = tuple(self.scale * float(word) for word in said)
        return Verdict(annotator="digits", oracle_version=self.version, scores=scores, cost=Cost(calls=1))


class FirstWins(Oracle):
    """Prefers whatever stands first in the list, and scores by the place."""

    scores: bool = False

    @property
    def version(self):
        return "first"

    def judge(self, queries):
        return [self.one(len(query.responses)) for query in queries]

    def one(self, k):
        cells = tuple(tuple(math.nan if i == j else float(i < j) for j in range(k)) for i in range(k))
        scores = tuple(float(-i) for i in range(k)) if self.scores else None
        said = {"scores": scores} if self.scores else {"preferences": cells}
        return Verdict(annotator="first", oracle_version="first", cost=Cost(calls=1), **said)


def digits(place: int = 0, scale: float = 1.0) -> dict:
    return {"name": f"{__name__}.Digits", "place": place, "scale": scale}


FIRST = {"name": f"{__name__}.FirstWins"}


def built(name: str, **knobs) -> Oracle:
    return component({"name": name, **knobs}, "oracle", "oracles", Oracle)


def ask(oracle: Oracle, *responses: str, name: str = "p"):
    (result,) = oracle.ask([query(*responses, name=name)])
    return result


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- ensembles ---


@pytest.mark.parametrize(
    ("knobs", "scores"),
    [
        ({}, (3.0, 4.0)),
        ({"combine": "min"}, (2.0, 1.0)),
        ({"combine": "lcb", "lcb_coef": 2.0}, (1.0, -2.0)),  # standard deviations 1 and 3
        ({"means": {"a": 2.0}, "stds": {"a": 0.5}}, (2.0, 0.5)),  # 0 and -2 beside 4 and 7: (0 + 4) / 2, (-2 + 7) / 2
    ],
)
def test_scores_of_an_ensemble_by_hand(knobs, scores):
    verdict = ask(built("ensemble", members={"a": digits(0), "b": digits(1)}, **knobs), "2 4", "1 7")
    if "means" in knobs:
        scores = (2.0, 2.5)
    assert verdict.scores == pytest.approx(scores)
    assert verdict.components["a"] == (2.0, 1.0)
    assert verdict.components["b"] == (4.0, 7.0)
    assert verdict.cost.calls == 2


def test_the_uncertainty_is_how_far_members_disagree():
    verdict = ask(built("ensemble", members={"a": digits(0), "b": digits(1)}), "2 4", "1 7")
    p, q = sigmoid(1), sigmoid(-3)
    wanted = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    assert verdict.uncertainty[0][1] == pytest.approx(wanted)
    assert verdict.uncertainty[1][0] == pytest.approx(wanted)
    assert verdict.mean_uncertainty() == pytest.approx(wanted)
    assert verdict.components["std"] == (1.0, 3.0)


def test_members_that_are_the_same_do_not_disagree():
    verdict = ask(built("ensemble", members={"a": digits(0), "b": digits(0)}, combine="lcb", lcb_coef=5.0), "2", "1")
    assert verdict.scores == (2.0, 1.0)
    assert verdict.components["std"] == (0.0, 0.0)
    assert np.abs(verdict.uncertainty).max() == 0


def test_another_scale_of_a_member_changes_nothing_once_it_is_divided_by():
    def of(scale: float):
        members = {"a": digits(0, scale), "b": digits(1)}
        stds = {"a": 2.0 * scale, "b": 1.0}
        return ask(built("ensemble", members=members, combine="lcb", lcb_coef=1.0, stds=stds), "2 4", "1 7")

    assert of(1.0).scores == pytest.approx(of(50.0).scores)
    np.testing.assert_allclose(of(1.0).uncertainty, of(50.0).uncertainty, atol=1e-12)


def test_votes_and_means_of_members_that_compare():
    members = {"a": digits(0), "b": digits(1), "c": FIRST}
    vote = ask(built("ensemble", members=members, combine="vote"), "2 4", "1 7")
    assert vote.scores is None
    assert vote.matrix()[0, 1] == pytest.approx(2 / 3)
    mean = ask(built("ensemble", members=members), "2 4", "1 7")
    assert mean.scores is None
    assert mean.matrix()[0, 1] == pytest.approx((sigmoid(1) + sigmoid(-3) + 1) / 3)
    with pytest.raises(OracleError, match="c only compares responses"):
        ask(built("ensemble", members=members, combine="min"), "2 4", "1 7")


def test_a_member_that_fails_is_not_left_out_in_silence():
    failure = ask(built("ensemble", members={"a": digits(0), "b": digits(1)}), "2 !", "1 7")
    assert failure.message == "members.b: met a !"


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ({"members": {"a": digits(0)}}, "oracle.members"),
        ({"members": {"a": digits(0), "std": digits(1)}}, "oracle.members"),
        ({"combine": "lcb"}, "oracle.lcb_coef"),
        ({"lcb_coef": 1.0}, "oracle.lcb_coef"),
        ({"stds": {"c": 1.0}}, "oracle.stds"),
    ],
)
def test_what_an_ensemble_refuses(knobs, field):
    with pytest.raises(ConfigError) as error:
        built("ensemble", **{"members": {"a": digits(0), "b": digits(1)}, **knobs})
    assert error.value.field == field


# --- both orders ---


def test_an_oracle_that_goes_by_the_place_is_found_out():
    verdict = ask(built("swapped", base=FIRST), "x", "y", "z")
    off = ~np.eye(3, dtype=bool)
    assert (verdict.matrix() == 0.5).all()
    np.testing.assert_allclose(np.asarray(verdict.uncertainty)[off], math.log(2))
    assert verdict.cost.calls == 2
    scored = ask(built("swapped", base=FIRST | {"scores": True}), "x", "y", "z")
    assert scored.scores == (-1.0, -1.0, -1.0)
    assert scored.mean_uncertainty() > 0.1


def test_an_oracle_that_reads_texts_is_as_it_was():
    verdict = ask(built("swapped", base=digits()), "3", "1", "2")
    assert verdict.scores == (3.0, 1.0, 2.0)
    assert verdict.mean_uncertainty() == 0
    assert ask(built("swapped", base=digits()), "3").cost.calls == 1, "a single response has one order"


def test_both_orders_are_counted_as_requests():
    class Paid(Digits):
        def requests(self, responses):
            return responses

        def most_usd(self, prompt_tokens, response_tokens, responses):
            return 0.5 * responses

    oracle = built("swapped", base=digits()).with_inner({"base": Paid()})
    assert (oracle.requests(3), oracle.requests(1)) == (6, 1)
    assert oracle.most_usd(1, 1, 3) == 3.0
    assert built("swapped", base=digits()).requests(3) is None


# --- noise ---


def test_what_has_no_noise_is_refused():
    with pytest.raises(ConfigError, match="has no noise"):
        built("noisy", base=digits())
    with pytest.raises(ConfigError, match="is missing"):
        built("noisy", flip_rate=0.1)


def many(oracle: Oracle, n: int = 4000) -> np.ndarray:
    """Raw cells [n, 2, 2] of pairs of which the first is better."""
    results = oracle.judge([query("10", "0", name=f"p{i}") for i in range(n)])
    return np.array([result.preferences for result in results])


@pytest.mark.parametrize(("rate", "disagreement"), [(0.05, 0.095), (0.1, 0.18), (0.2, 0.32), (0.3, 0.42)])
def test_flips_of_each_order_show_as_disagreement(rate, disagreement):
    """2 e (1 - e) of the pairs; of those whose orders agree e^2 / (1 - d) are wrong."""
    cells = many(built("noisy", base=digits(), flip_rate=rate, scope="call"))
    first, second = cells[:, 0, 1] > 0.5, cells[:, 1, 0] < 0.5  # both say: the better one wins
    assert (first != second).mean() == pytest.approx(disagreement, abs=0.025)
    agreed = first == second
    assert 1 - first[agreed].mean() == pytest.approx(rate**2 / (1 - disagreement), abs=0.02)


def test_flips_of_pairs_are_the_same_in_both_orders():
    cells = many(built("noisy", base=digits(), flip_rate=0.2))
    np.testing.assert_allclose(cells[:, 0, 1] + cells[:, 1, 0], 1.0)
    assert (cells[:, 0, 1] < 0.5).mean() == pytest.approx(0.2, abs=0.02)


def test_other_noise_on_pairs_by_hand():
    def cell(**knobs):
        return np.asarray(ask(built("noisy", base=digits(), **knobs), "2 one two", "1").preferences)

    assert cell(choice_temperature=2.0)[0, 1] == pytest.approx(sigmoid(0.5))
    assert cell(length_bias=0.5)[0, 1] == pytest.approx(sigmoid(1 + 0.5 * 2))
    assert cell(position_bias=0.1)[0, 1] == pytest.approx(sigmoid(1) + 0.1)
    assert cell(position_bias=0.1)[1, 0] == pytest.approx(sigmoid(-1) + 0.1)
    assert cell(position_bias=1.0)[1, 0] == 1.0
    assert cell(tie_band=0.3)[0, 1] == 0.5
    assert cell(tie_band=0.2)[0, 1] == pytest.approx(sigmoid(1))
    results = built("noisy", base=digits(), sampled=True).judge([query("1", "0", name=f"p{i}") for i in range(3000)])
    drawn = np.array([result.preferences[0][1] for result in results])
    assert set(drawn) == {0.0, 1.0}
    assert drawn.mean() == pytest.approx(sigmoid(1), abs=0.025)


def test_noise_on_scores_keeps_them_scores():
    oracle = built("noisy", base=digits(), score_noise=0.5)
    verdicts = oracle.judge([query("2", "1", name=f"p{i}") for i in range(3000)])
    gaps = np.array([verdict.scores for verdict in verdicts]) - [2.0, 1.0]
    assert gaps.mean() == pytest.approx(0, abs=0.03)
    assert gaps.std() == pytest.approx(0.5, abs=0.03)
    assert np.corrcoef(gaps.T)[0, 1] == pytest.approx(0, abs=0.06)
    failure = ask(built("noisy", base=FIRST, score_noise=0.5), "x", "y")
    assert isinstance(failure, Failure)


def test_the_same_question_gets_the_same_noise_and_the_clean_verdict_is_kept():
    oracle, again = (built("noisy", base=digits(), flip_rate=0.5, scope="call") for _ in range(2))
    np.testing.assert_array_equal(many(oracle, 50), many(again, 50))
    other = built("noisy", base=digits(), flip_rate=0.5, scope="call", seed=1)
    assert (many(oracle, 50) != many(other, 50)).any()
    assert other.version != oracle.version
    assert ask(oracle, "1", "0").raw == '{"without_noise": [[0.5, 0.7311], [0.2689, 0.5]]}'
