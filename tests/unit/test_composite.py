"""Oracles that consist of others: how they are written, checked and asked; and the ways to combine scores, by hand."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

from onlinerl import config as configuration
from onlinerl.config import component
from onlinerl.errors import ConfigError, OracleError
from onlinerl.protocols.oracle import ModelOracle, Oracle, leaves, with_weights
from onlinerl.types import Cost, Failure, Prompt, Query, Replies, Verdict

NAN = math.nan


def query(*responses: str, name: str = "p", answer: str | None = None) -> Query:
    return Query(prompt=Prompt(id=name, text="what ", token_ids=(1,), reference_answer=answer), responses=responses)


class Digits(Oracle):
    """The number at one place of each response; `?` is not judged, `!` fails, `#` stops the run."""

    place: int = 0

    @property
    def version(self):
        return f"digits-{self.place}"

    def judge(self, queries):
        return [self.one(query) for query in queries]

    def one(self, query):
        said = [response.split()[self.place] for response in query.responses]
        if "#" in said:
            raise OracleError("met a #", field="oracle.place", fix="set oracle.place to another number")
        if "!" in said:
            return Failure(kind="refused", message="met a !", cost=Cost(calls=1))
        scores = tuple(NAN if word == "?" else float(word) for word in said)
        unknown = tuple(k for k, score in enumerate(scores) if math.isnan(score))
        return Verdict(
            annotator="digits", oracle_version=self.version, scores=scores, unjudged=unknown, cost=Cost(calls=1, usd=0.5)
        )


class Ranks(Digits):
    """Compares the same numbers, and gives no score."""

    def judge(self, queries):
        for query in queries:
            (verdict,) = super().judge([query])
            yield Verdict(annotator="ranks", oracle_version="ranks", preferences=tuple(map(tuple, verdict.matrix().tolist())))


class Slow(Oracle):
    """Counts how many calls are under way at once."""

    max_concurrent: int = 2
    groups_per_call: int = 1

    @property
    def version(self):
        return "slow"

    def judge(self, queries):
        with LOCK:
            SEEN["now"] += 1
            SEEN["most"] = max(SEEN["most"], SEEN["now"])
            SEEN["sizes"].add(len(queries))
        time.sleep(0.01)
        with LOCK:
            SEEN["now"] -= 1
        return [Verdict(annotator="slow", oracle_version="slow", scores=(1.0,) * len(q.responses)) for q in queries]


class Flaky(Oracle):
    """Loses its connection once in each process."""

    retries: int = 1

    @property
    def version(self):
        return "flaky"

    def judge(self, queries):
        if not TRIED:
            TRIED.append(1)
            raise ConnectionError("gone")
        return [Verdict(annotator="flaky", oracle_version="flaky", scores=(1.0,) * len(q.responses)) for q in queries]


class Weights(ModelOracle):
    """Stands for a model."""

    path: str = "somewhere"

    def absent(self):
        return None

    def inspect(self):
        if self.path == "broken":
            raise OracleError("has two labels", field="oracle.path", fix="set oracle.path to another one")

    @property
    def version(self):
        return f"weights-{self.path}"

    def judge(self, queries):
        return [
            Verdict(annotator="w", oracle_version=self.version, scores=tuple(map(float, map(len, q.responses))))
            for q in queries
        ]


LOCK = threading.Lock()
SEEN: dict = {"now": 0, "most": 0, "sizes": set()}
TRIED: list = []


def digits(place: int) -> dict:
    return {"name": f"{__name__}.Digits", "place": place}


def built(name: str = "composite", **knobs) -> Oracle:
    return component({"name": name, **knobs}, "oracle", "oracles", Oracle)


def ask(oracle: Oracle, *responses: str):
    (result,) = oracle.ask([query(*responses)])
    return result


def composite(**knobs) -> Oracle:
    return built(members={"a": digits(0), "b": digits(1)}, **knobs)


# --- the ways to combine, by hand ---


@pytest.mark.parametrize(
    ("knobs", "scores"),
    [
        ({}, (3.0, 1.0)),  # 1 + 2, 4 - 3
        ({"weights": {"b": -1.0}}, (-1.0, 7.0)),
        ({"weights": {"a": 2.0, "b": 0.0}}, (2.0, 8.0)),
        ({"means": {"a": 1.0}, "stds": {"a": 2.0}}, (2.0, -1.5)),  # 0 + 2, 1.5 - 3
        ({"combine": "product"}, (2.0, -12.0)),
        ({"combine": "min"}, (1.0, -3.0)),
        ({"combine": "min", "weights": {"a": 3.0}}, (2.0, -3.0)),
        ({"combine": "softmin", "softmin_temperature": 1.0}, (-math.log((math.exp(-1) + math.exp(-2)) / 2), None)),
        ({"combine": "hierarchical", "holistic": "a", "holistic_above": 2.0, "weights": {"a": 3.0}}, (3.0, 9.0)),
        ({"gates": {"b": 0.0}, "gated_score": -9.0}, (3.0, -9.0)),
        ({"gates": {"a": 2.0, "b": 3.0}, "gated_score": -9.0}, (-9.0, -9.0)),
    ],
)
def test_scores_by_hand(knobs, scores):
    verdict = ask(composite(**knobs), "1 2", "4 -3")
    for given, wanted in zip(verdict.scores, scores, strict=True):
        assert wanted is None or given == pytest.approx(wanted)
    assert verdict.components == {"a": (1.0, 4.0), "b": (2.0, -3.0)}
    assert (verdict.cost.calls, verdict.cost.usd) == (2, 1.0)


def test_a_soft_minimum_is_between_the_minimum_and_the_mean():
    cold, hot = (ask(composite(combine="softmin", softmin_temperature=t), "1 2", "4 -3").scores for t in (1e-3, 1e6))
    assert cold == pytest.approx((1.0, -3.0), abs=1e-2)
    assert hot == pytest.approx((1.5, 0.5), abs=1e-4)


def test_votes_are_shares_of_the_members_that_prefer_a_response():
    oracle = built(
        members={"a": digits(0), "b": digits(1), "c": {"name": f"{__name__}.Ranks", "place": 2}},
        combine="vote",
        weights={"b": -2.0},
    )
    verdict = ask(oracle, "1 1 1", "9 2 1", "0 2 5")
    assert verdict.scores is None
    # a: 2 1 3 (best first); b, where less is better and which counts twice: 1, then a tie; c: 3, then a tie.
    np.testing.assert_allclose(verdict.matrix(), [[0.5, 2.5 / 4, 3 / 4], [1.5 / 4, 0.5, 2 / 4], [1 / 4, 2 / 4, 0.5]])
    assert verdict.components == {"a": (1.0, 9.0, 0.0), "b": (1.0, 2.0, 2.0)}


def test_permuting_members_with_their_weights_changes_nothing():
    one = built(members={"a": digits(0), "b": digits(1)}, weights={"a": 2.0, "b": -1.0})
    other = built(members={"b": digits(1), "a": digits(0)}, weights={"b": -1.0, "a": 2.0})
    assert ask(one, "1 2", "4 -3").scores == ask(other, "1 2", "4 -3").scores
    assert one.version == other.version


def test_what_a_member_has_not_judged_is_not_judged():
    """Neither by a gate nor by a weight of 0."""
    for knobs in ({}, {"weights": {"b": 0.0}}, {"gates": {"a": 5.0}, "gated_score": 0.0}):
        verdict = ask(composite(**knobs), "1 2", "4 ?", "9 1")
        assert verdict.unjudged == (1,)
        assert verdict.judged().tolist() == [True, False, True]
        assert math.isnan(verdict.components["b"][1])


def test_a_member_that_fails_makes_the_group_a_failure_that_says_who():
    failure = ask(composite(), "1 2", "4 !")
    assert (failure.kind, failure.message) == ("refused", "members.b: met a !")
    assert (failure.cost.calls, failure.cost.usd) == (2, 0.5), "what the other one cost is counted"


def test_scores_inside_scores_have_both_names():
    oracle = built(members={"outer": {"name": "composite", "members": {"a": digits(0), "b": digits(1)}}, "c": digits(0)})
    verdict = ask(oracle, "1 2", "4 -3")
    assert verdict.components == {"outer": (3.0, 1.0), "outer_a": (1.0, 4.0), "outer_b": (2.0, -3.0), "c": (1.0, 4.0)}
    assert set(oracle.components) == set(verdict.components)
    clash = built(members={"outer": {"name": "composite", "members": {"a": digits(0)}}, "outer_a": digits(0)})
    with pytest.raises(OracleError, match="two scores are called outer_a"):
        ask(clash, "1 2", "4 -3")


# --- what is refused ---


@pytest.mark.parametrize(
    ("knobs", "field", "cause"),
    [
        ({"members": {}}, "oracle.members", "at least 1"),
        ({"members": [digits(0)]}, "oracle.members", "is a list"),
        ({"members": {"Good": digits(0)}}, "oracle.members", "no name for an oracle"),
        ({"members": {"kl": digits(0)}}, "oracle.members", "no name for an oracle"),
        ({"members": {"a": "sentiment"}}, "oracle.members.a", "is 'sentiment'"),
        ({"members": {"a": {"name": "nothing"}}}, "oracle.members.a.name", "there is no 'nothing'"),
        ({"members": {"a": {"name": "format"}}}, "oracle.members.a.pattern", "is missing"),
        ({"members": {"a": digits(0) | {"plaice": 1}}}, "oracle.members.a.plaice", "not a known key"),
        ({"weights": {"c": 1.0}}, "oracle.weights", "'c', which is no member"),
        ({"gates": {"c": 1.0}, "gated_score": 0.0}, "oracle.gates", "'c', which is no member"),
        ({"gates": {"a": 1.0}}, "oracle.gated_score", "is missing"),
        ({"gated_score": 1.0}, "oracle.gates", "is missing"),
        ({"stds": {"a": 0.0}}, "oracle.stds", "of a is 0"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "oracle.weights", "all 0"),
        ({"combine": "product", "weights": {"a": 2.0}}, "oracle.weights", "of a product"),
        ({"combine": "softmin"}, "oracle.softmin_temperature", "is missing"),
        ({"softmin_temperature": 1.0}, "oracle.softmin_temperature", "belongs to combine=softmin"),
        ({"combine": "hierarchical", "holistic_above": 1.0}, "oracle.holistic", "is missing"),
        ({"combine": "hierarchical", "holistic_above": 1.0, "holistic": "c"}, "oracle.holistic", "no member"),
        ({"combine": "vote", "means": {"a": 1.0}}, "oracle.means", "combine=vote"),
        ({"combine": "vote", "gates": {"a": 1.0}, "gated_score": 0.0}, "oracle.gates", "combine=vote"),
        ({"retries": 2}, "oracle.retries", "0"),
    ],
)
def test_what_cannot_be_meant_is_refused(knobs, field, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        built(**{"members": {"a": digits(0), "b": digits(1)}, **knobs})
    assert error.value.field == field
    assert error.value.fix


def test_errors_of_an_inner_oracle_name_its_section_however_deep():
    with pytest.raises(ConfigError) as error:
        built(members={"x": {"name": "composite", "members": {"y": {"name": "sentiment", "words": 1}}}})
    assert error.value.field == "oracle.members.x.members.y.words"
    oracle = built(members={"x": {"name": "composite", "members": {"y": digits(0)}}})
    with pytest.raises(OracleError) as raised:
        ask(oracle, "#", "1")
    assert raised.value.field == "oracle.members.x.members.y.place"
    assert raised.value.fix == "set oracle.members.x.members.y.place to another number"


def test_a_member_that_only_compares_cannot_be_added():
    oracle = built(members={"a": digits(0), "b": {"name": f"{__name__}.Ranks"}})
    with pytest.raises(OracleError, match="b only compares responses") as error:
        ask(oracle, "1 2", "4 -3")
    assert error.value.field == "oracle.members.b"


# --- each inner oracle is asked as it would be alone ---


def test_inner_oracles_keep_their_own_calls():
    SEEN.update(now=0, most=0, sizes=set())
    oracle = built(members={"a": {"name": f"{__name__}.Slow"}, "b": digits(0)})
    results = list(oracle.ask([query("1", "2", name=f"p{i}") for i in range(8)]))
    assert len(results) == 8
    assert SEEN["most"] == 2, "as many at once as it allows"
    assert SEEN["sizes"] == {1}
    assert [result.scores for result in results] == [(2.0, 3.0)] * 8


def test_two_calls_share_the_places_of_an_inner_oracle():
    SEEN.update(now=0, most=0, sizes=set())
    oracle = built(members={"a": {"name": f"{__name__}.Slow"}})
    threads = [
        threading.Thread(target=lambda: list(oracle.ask([query("1", name=f"p{i}") for i in range(6)]))) for _ in range(3)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert SEEN["most"] == 2


def test_inner_oracles_are_tried_again_as_they_would_be_alone(monkeypatch):
    from onlinerl import oracle_calls

    monkeypatch.setattr(oracle_calls, "FIRST_PAUSE_S", 0.0)
    TRIED.clear()
    flaky = {"name": f"{__name__}.Flaky"}
    assert ask(built(members={"a": flaky}), "1", "2").scores == (1.0, 1.0)
    TRIED.clear()
    failure = ask(built(members={"a": flaky | {"retries": 0}}), "1", "2")
    assert failure.kind == "error"
    assert "ConnectionError" in failure.message


def test_an_inner_oracle_that_never_answers_costs_its_deadline():
    class Deaf(Oracle):
        call_timeout_s: float = 0.05
        retries: int = 0

        @property
        def version(self):
            return "deaf"

        def judge(self, queries):
            threading.Event().wait(5)

    oracle = composite().with_inner({"members.a": Deaf()})
    failure = ask(oracle, "1 2", "4 -3")
    assert (failure.kind, "members.a: Deaf gave no answer" in failure.message) == ("timeout", True)


# --- in a configuration ---


def settled(tmp_path, oracle: dict, **more) -> configuration.RunConfig:
    tree = {"name": "run", "model": "m", "iterations": 1, "algorithm": {"name": "dpo"}, "oracle": oracle, **more}
    return configuration.parse(
        {**tree, "prompts": {"train": "a", "heldout": "b"}, "engine": {"cpus": 0}, "learner": {"cpus": 0}}
    )


WEIGHED = {
    "name": "composite",
    "members": {
        "small": {"name": f"{__name__}.Weights", "replicas": 2, "cpus": 1, "path": "small"},
        "rule": {"name": "sentiment"},
        "more": {"name": "composite", "members": {"large": {"name": f"{__name__}.Weights", "resources": {"big": 1}}}},
    },
}


def test_a_configuration_is_read_back_as_it_was_written(tmp_path):
    config = settled(tmp_path, WEIGHED)
    file = tmp_path / "run.yaml"
    file.write_text(configuration.dump(config))
    again = configuration.load(file, ["oracle.members.small.replicas=3"])
    assert again.oracle["members"]["small"]["replicas"] == 3
    assert again.oracle["members"]["rule"]["name"] == "sentiment"
    assert configuration.fingerprint(again) == configuration.fingerprint(config), "a resume may change it"
    assert configuration.changes(configuration.fingerprint(config), again) == {}
    other = configuration.load(file, ["oracle.members.small.path=other"])
    assert set(configuration.changes(configuration.fingerprint(config), other)) == {"oracle.members.small.path"}


def test_a_key_of_a_later_version_counts_as_its_default(tmp_path):
    config = settled(tmp_path, WEIGHED)
    stored = {k: v for k, v in configuration.fingerprint(config).items() if k != "oracle.members.rule.include_prompt"}
    assert configuration.changes(stored, config) == {}


def test_files_are_found_beside_the_configuration(tmp_path):
    (tmp_path / "here.py").write_text("def judge(groups):\n    return [[1.0] * len(g['responses']) for g in groups]\n")
    config = settled(tmp_path, {"name": "composite", "members": {"a": {"name": "python", "function": "here.py:judge"}}})
    from onlinerl.config.loading import located

    found = located(config, [tmp_path])
    assert found.oracle["members"]["a"]["function"] == f"{tmp_path}/here.py:judge"
    assert ask(configuration.oracle(found), "x", "y").scores == (1.0, 1.0)


def test_room_is_reserved_for_every_oracle_with_weights(tmp_path):
    from onlinerl import placement

    config = settled(tmp_path, WEIGHED)
    plan = placement.plan(config, "cpu")
    assert [p.role for p in plan] == [
        "learner rank 0", "replica 0", "oracle.members.small 0", "oracle.members.small 1", "oracle.members.more.members.large 0"
    ]  # fmt: skip
    assert [p.bundle for p in plan] == [0, 1, 2, 3, 4]
    assert plan[-1].resources == {"big": 1}
    assert [p.gpus for p in placement.plan(config, "cuda")] == [1, 1, 1, 1, 1]
    alone = settled(tmp_path, WEIGHED["members"]["small"])
    assert [p.role for p in placement.plan(alone, "cpu")][2:] == ["oracle 0", "oracle 1"]


def test_leaves_are_what_is_tried_and_placed(tmp_path):
    oracle = configuration.oracle(settled(tmp_path, WEIGHED))
    assert list(leaves(oracle)) == ["oracle.members.small", "oracle.members.rule", "oracle.members.more.members.large"]
    assert list(with_weights(oracle)) == ["oracle.members.small", "oracle.members.more.members.large"]
    assert leaves(oracle.members["rule"]) == {"oracle": oracle.members["rule"]}


def test_oracles_with_weights_are_replaced_where_they_are():
    """As the cluster does with those that run in processes of their own."""

    class Elsewhere(Oracle):
        @property
        def version(self):
            return "elsewhere"

        def judge(self, queries):
            return [Verdict(annotator="e", oracle_version="e", scores=(7.0,) * len(q.responses)) for q in queries]

    oracle = built(members={"a": digits(0), "b": digits(1)})
    replaced = oracle.with_inner({"members.b": Elsewhere()})
    assert ask(replaced, "1 2", "4 -3").scores == (8.0, 11.0)
    assert ask(oracle, "1 2", "4 -3").scores == (3.0, 1.0)
    assert replaced.version != oracle.version


def test_the_temperature_of_a_member_is_part_of_the_version():
    cold = {"a": digits(0) | {"preference_temperature": 0.5}, "b": digits(1)}
    assert built(members=cold).version != composite().version


# --- format ---


@pytest.mark.parametrize(
    ("knobs", "scores"),
    [
        ({"pattern": "<think>.*?</think>.*"}, (1, 0, 0, 0)),
        ({"pattern": "<think>.*?</think>.*", "ignore_case": True}, (1, 0, 1, 0)),
        ({"pattern": "<think>.*?</think>", "match": "anywhere"}, (1, 1, 0, 0)),
        ({"pattern": "<think>.*?</think>", "match": "anywhere", "negate": True}, (0, 0, 1, 1)),
        ({"pattern": "^no$", "match": "anywhere"}, (1, 0, 0, 0)),
        ({"pattern": ".*", "min_length": 20}, (1, 1, 0, 0)),
        ({"pattern": ".*", "max_length": 19}, (0, 0, 1, 1)),
        ({"pattern": ".*", "max_length": 0}, (0, 0, 0, 1)),
    ],
)
def test_the_form_of_a_response(knobs, scores):
    texts = ("<think>a\nb</think>\nno", "so <think>a</think> no", "<THINK>a</THINK> no", "")
    assert ask(built("format", **knobs), *texts).scores == scores


def test_a_response_on_which_an_expression_takes_for_ever_is_not_judged():
    """It costs two deadlines and counts as failed. What has another form still gets 0."""
    oracle = built("format", pattern="(a|aa|a?a)+$", timeout_s=0.2)
    slow = "a" * 5000 + "b"
    verdict = ask(oracle, slow, "aaa", "x")
    np.testing.assert_array_equal(verdict.scores, (math.nan, 1.0, 0.0))
    assert (verdict.unjudged, verdict.replies) == ((0,), Replies(asked=3, failed={"timeout": 1}))
    assert verdict.raw == "response 0: timeout: not searched within 0.2 s, twice"
    failure = ask(oracle, slow, "aaa")
    assert isinstance(failure, Failure), "one response that is left is better than nothing"
    assert (failure.kind, failure.replies) == ("timeout", Replies(asked=2, failed={"timeout": 1}))
    assert isinstance(ask(oracle, slow), Failure)


def test_what_is_no_expression_is_refused():
    with pytest.raises(ConfigError, match="no regular expression") as error:
        built("format", pattern="(")
    assert error.value.field == "oracle.pattern"
