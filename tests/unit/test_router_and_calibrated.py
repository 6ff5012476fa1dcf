"""Routing under a budget, and probabilities that are made true."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from onlinerl.config import component
from onlinerl.errors import ConfigError, OracleError
from onlinerl.ops import calibration
from onlinerl.oracles._inner import keep, kept
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Prompt, Query, Verdict


def query(*responses: str, name: str = "p") -> Query:
    return Query(prompt=Prompt(id=name, text="what ", token_ids=(1,) * 30), responses=responses)


class Digits(Oracle):
    """The number at one place of each response; `!` fails."""

    place: int = 0
    scale: float = 1.0

    @property
    def version(self):
        return f"digits-{self.place}-{self.scale}"

    def judge(self, queries):
        for query in queries:
            ASKED.append((self.place, query.prompt.id))
            yield self.one(query)

    def one(self, query):
        said = [response.split()[self.place] for response in query.responses]
        if "!" in said:
            return Failure(kind="refused", message="met a !", cost=Cost(calls=1, usd=0.4))
        scores = tuple(self.scale * float(word) for word in said)
        return Verdict(annotator="digits", oracle_version=self.version, scores=scores, cost=Cost(calls=1, usd=0.1))


class Priced(Digits):
    """Costs at most 0.4 dollars a try, and 0.1 if all goes well."""

    retries: int = 1

    def requests(self, responses):
        return 1

    def most_usd(self, prompt_tokens, response_tokens, responses):
        assert (prompt_tokens, response_tokens > 0) in ((30, True), (1, True))
        return 0.4


class Biased(Oracle):
    """Compares numbers, three times as sure as it may be, and likes what is shown first; in one order only, if it is so told."""

    one_order: bool = False

    @property
    def version(self):
        return f"biased-{self.one_order}"

    def judge(self, queries):
        return [self.one(query.responses) for query in queries]

    def one(self, responses):
        numbers = [float(response) for response in responses]
        k = range(len(numbers))
        odds = [
            [math.nan if i == j or (self.one_order and i > j) else 3 * (numbers[i] - numbers[j]) + 0.8 for j in k] for i in k
        ]
        probs = [[1 / (1 + math.exp(-cell)) if cell == cell else cell for cell in row] for row in odds]
        cells = tuple(map(tuple, probs)), tuple(map(tuple, odds))
        return Verdict(annotator="b", oracle_version=self.version, preferences=cells[0], log_odds=cells[1], cost=Cost(calls=1))


ASKED: list[tuple[int, str]] = []


def digits(place: int, **more) -> dict:
    return {"name": f"{__name__}.Digits", "place": place, **more}


PRICED = {"name": f"{__name__}.Priced", "place": 1}


def built(name: str, **knobs) -> Oracle:
    return component({"name": name, **knobs}, "oracle", "oracles", Oracle)


def router(**knobs) -> Oracle:
    return built("router", **{"cheap": digits(0), "expensive": digits(1), "audit": 0.0, **knobs})


def sources(oracle: Oracle, *queries: Query) -> list[str]:
    return [verdict.annotator.split(":")[1] for verdict in oracle.ask(list(queries))]


# --- routing ---


def test_what_the_cheap_one_is_sure_of_is_not_asked_again():
    ASKED.clear()
    close, clear = query("0 5", "0.1 1", name="close"), query("0 5", "9 1", name="clear")
    oracle = router(expensive_below=0.5)
    first, second = oracle.ask([close, clear])
    assert ASKED == [(0, "close"), (0, "clear"), (1, "close")]
    assert (first.annotator, second.annotator) == ("router:expensive:digits", "router:cheap:digits")
    assert first.scores is None
    assert first.matrix()[0, 1] == pytest.approx(1 / (1 + math.exp(-4)))
    assert second.matrix()[0, 1] == pytest.approx(1 / (1 + math.exp(9)))
    assert (first.cost.calls, second.cost.calls) == (2, 1)
    note = json.loads(first.raw)
    assert (note["by"], note["because"], note["same_winners"]) == ("expensive", "not sure", 0.0)
    assert note["cheap_is_sure"] == pytest.approx(2 / (1 + math.exp(-0.1)) - 1, abs=1e-4)


def test_always_and_never_are_one_of_the_two():
    groups = [query("0 5", "9 1", name="a"), query("1 1", "1 1", name="b")]
    for below, place in ((0.0, 0), (1.0, 1)):
        alone = list(built(**digits(place)).ask(groups))
        for one, verdict in zip(router(expensive_below=below).ask(groups), alone, strict=True):
            np.testing.assert_allclose(one.matrix(), verdict.matrix())


def test_how_much_is_asked_is_known_only_where_both_are_asked_always_or_one_never():
    once = {"name": f"{__name__}.Priced", "place": 0}
    known = {"expensive_below": 1.0}, {"expensive_below": 0.0, "audit": 0.0}
    unknown = {"expensive_below": 0.3}, {"expensive_below": 0.0}, {"expensive_below": 1.0, "budget_groups": 3}
    asked = [router(cheap=once, expensive=PRICED, **{"audit": 0.01, **knobs}) for knobs in (*known, *unknown)]
    assert [one.asks_as_needed for one in asked] == [False, False, True, True, True]
    assert [one.requests(4) for one in asked] == [2, 1, 2, 2, 2]
    assert {one.requests(1) for one in asked} == {1}, "a single response is compared with nothing"
    assert built("swapped", base={"name": "router", "cheap": once, "expensive": PRICED}).asks_as_needed


def test_each_keeps_its_own_temperature():
    oracle = router(expensive_below=1.0, expensive=digits(1, preference_temperature=4.0), preference_temperature=9.0)
    (verdict,) = oracle.ask([query("0 5", "0 1")])
    assert verdict.matrix()[0, 1] == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_share_is_asked_at_random_and_always_the_same():
    groups = [query("0 5", "9 1", name=f"p{i}") for i in range(600)]
    said = sources(router(expensive_below=0.0, audit=0.2), *groups)
    assert said.count("expensive") == pytest.approx(120, abs=30)
    assert said == sources(router(expensive_below=0.0, audit=0.2), *groups)
    assert said != sources(router(expensive_below=0.0, audit=0.2, seed=1), *groups)


def test_no_more_than_the_budget_is_asked_over_all_resumes(tmp_path):
    groups = [query("0 5", "0 1", name=f"p{i}") for i in range(8)]
    ASKED.clear()
    for _ in range(3):
        oracle = router(budget_groups=5)
        oracle.remember(tmp_path)
        said = sources(oracle, *groups[:4])
    assert sum(place for place, _ in ASKED) == 5
    assert said == ["cheap"] * 4
    assert '"because": "budget"' in next(iter(oracle.ask(groups[:1]))).raw
    assert oracle.remarks == ["the expensive oracle may be asked for 0 of 5 groups more"]
    assert sources(router(budget_groups=0), *groups) == ["cheap"] * 8


def test_a_trial_before_the_run_counts_too(tmp_path):
    for _ in range(2):
        oracle = router(budget_groups=4)
        sources(oracle, query("0 5", "0 1", name="trial"))  # as `check` and the start of a run do
        oracle.remember(tmp_path)
        sources(oracle, query("0 5", "0 1", name="first"))
    assert kept(tmp_path / "spent.json")["groups"] == 4
    assert sources(oracle, query("0 5", "0 1")) == ["cheap"]


def test_what_a_group_may_cost_at_most_is_set_aside_first(tmp_path):
    """Each try costs up to 0.4 and there may be two: 0.8 is set aside, and 0.1 is what it was."""
    oracle = router(expensive=PRICED, budget_usd=1.0, groups_per_call=1)
    oracle.remember(tmp_path)
    said = sources(oracle, query("0 5", "0 1", name="a"), query("0 5", "0 1", name="b"), query("0 5", "0 1", name="c"))
    assert said == ["expensive", "cheap", "cheap"], "together they might have cost 2.4"
    assert kept(tmp_path / "spent.json")["usd"] == pytest.approx(0.1)
    for name in "de":
        assert sources(oracle, query("0 5", "0 1", name=name)) == ["expensive"]
    assert sources(oracle, query("0 5", "0 1", name="f")) == ["cheap"], "0.3 is spent, and 0.8 more might be"
    (failure,) = router(expensive=PRICED, budget_usd=1.0).ask([query("0 !", "0 1")])
    assert failure.message == "expensive: met a !"
    assert failure.cost.usd == pytest.approx(0.5)


def test_a_kill_while_it_is_asked_counts_what_it_might_have_cost(tmp_path):
    oracle = router(expensive=PRICED, budget_usd=1.0)
    oracle.remember(tmp_path)
    oracle.__dict__["_settle"] = None  # as if the process ended there
    with pytest.raises(TypeError):
        list(oracle.ask([query("0 5", "0 1")]))
    again = router(expensive=PRICED, budget_usd=1.0)
    again.remember(tmp_path)
    assert sources(again, query("0 5", "0 1")) == ["cheap"]


def test_calls_at_the_same_time_do_not_overdraw():
    oracle = router(budget_groups=7)
    ASKED.clear()
    threads = [
        threading.Thread(target=lambda t=t: sources(oracle, *(query("0 5", "0 1", name=f"{t}-{i}") for i in range(4))))
        for t in range(5)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(place for place, _ in ASKED) == 7


def test_a_budget_in_dollars_needs_a_price(tmp_path):
    with pytest.raises(ConfigError, match="not known what `expensive` costs") as error:
        router(budget_usd=1.0)
    assert error.value.field == "oracle.budget_usd"
    (tmp_path / "spent.json").write_text("{")
    with pytest.raises(OracleError, match="cannot be read"):
        router().remember(tmp_path)


# --- calibration ---


def anchors(folder, n: int, *, truth: float = 1.0, seed: int = 0) -> str:
    """Pairs of numbers; the one that is `truth` times as far above wins with Bradley-Terry's probability. Which stands first as `chosen` is
    the winner, as in data sets."""
    draw = np.random.default_rng(seed)
    file = folder / "anchors.jsonl"
    with file.open("w") as opened:
        for _ in range(n):
            a, b = draw.normal(size=2).round(3)
            first = draw.random() < 1 / (1 + math.exp(-truth * (a - b)))
            chosen, rejected = (a, b) if first else (b, a)
            opened.write(json.dumps({"prompt": "which", "chosen": str(chosen), "rejected": str(rejected)}) + "\n")
    return str(file)


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (4.0, 4.0), (0.5, 0.5)])
def test_the_temperature_is_found(tmp_path, scale, temperature):
    """Of one that is calibrated already it is 1, up to what 4,000 pairs say."""
    oracle = built("calibrated", base=digits(0, scale=scale), data=anchors(tmp_path, 4000))
    oracle.open()
    assert 1 / oracle._fit.slope == pytest.approx(temperature, rel=0.1)
    (verdict,) = oracle.ask([query("2", "1", "3")])
    assert verdict.scores == (2 * scale, scale, 3 * scale), "scores and their order stay"
    assert verdict.matrix()[0, 1] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)
    said = oracle.remarks[0]
    assert said.startswith("calibrated on 4000 pairs: temperature")
    assert "noise of so many pairs" in said
    (single,) = oracle.ask([query("2")])
    assert (single.scores, single.preferences, single.judged().tolist()) == ((2 * scale,), None, [True])


def test_the_calibration_error_is_said_before_and_after(tmp_path):
    oracle = built("calibrated", base=digits(0, scale=5.0), data=anchors(tmp_path, 3000))
    oracle.open()
    before, after = (float(oracle.remarks[0].split(word)[0].rsplit(None, 1)[1]) for word in (" before", " after"))
    assert before > 0.1
    assert after < 0.05


def test_platt_takes_out_what_the_place_does(tmp_path):
    """A judge that is asked in one order likes the first by log-odds of 0.8, and is three times too sure."""
    data = anchors(tmp_path, 4000)
    lines = [json.loads(line) for line in Path(data).read_text().splitlines()]
    with open(data, "w") as file:  # so that not every winner stands first
        for i, row in enumerate(lines):
            turned = {"prompt": "which", "chosen": row["rejected"], "rejected": row["chosen"], "p": 0.0}
            file.write(json.dumps(row if i % 2 else turned) + "\n")
    base = {"name": f"{__name__}.Biased", "one_order": True}
    oracle = built("calibrated", base=base, data=data, method="platt")
    oracle.open()
    assert oracle._fit.slope == pytest.approx(1 / 3, rel=0.1)
    assert oracle._fit.intercept == pytest.approx(-0.8 / 3, abs=0.08)
    (verdict,) = oracle.ask([query("1", "1")])
    assert verdict.matrix()[0, 1] == pytest.approx(0.5, abs=0.02)
    both = built("calibrated", base=base | {"one_order": False}, data=data)
    both.open()
    assert 1 / both._fit.slope == pytest.approx(3, rel=0.1)
    (verdict,) = both.ask([query("1", "1")])
    assert verdict.matrix()[0, 1] == pytest.approx(0.5, abs=1e-9)


def test_what_check_has_found_is_kept_and_found_by_the_check_of_a_resume(tmp_path):
    """A run is checked before there is a folder of it."""
    data = anchors(tmp_path, 60)
    first = built("calibrated", base=digits(0), data=data)
    first.open()
    assert first.opening_cost == Cost(calls=60, usd=pytest.approx(6.0))
    first.remember(tmp_path / "oracle")
    ASKED.clear()
    again = built("swapped", base={"name": "calibrated", "base": digits(0), "data": data})
    (tmp_path / "oracle").rename(tmp_path / "base")
    again.recall(tmp_path)
    again.open()
    assert ASKED == []
    assert again.opening_cost == Cost()
    assert again.base.version == first.version


def test_every_flipped_bit_of_what_an_oracle_keeps_is_noticed(tmp_path):
    file = tmp_path / "calibration.json"
    said = {"of": {"base": "digits-0"}, "fit": {"slope": 1.25, "intercept": -0.5}, "report": "calibrated"}
    keep(file, said)
    assert kept(file) == said
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(OracleError, match="is damaged or cannot be read") as caught:
            kept(file)
        assert str(file) in caught.value.cause
    file.write_text(json.dumps(said))
    assert kept(file) == said, "an older version wrote no checksum"


def test_a_resume_does_not_ask_about_the_pairs_again(tmp_path):
    data = anchors(tmp_path, 60)
    first = built("calibrated", base=digits(0), data=data)
    first.remember(tmp_path / "oracle")
    first.open()
    ASKED.clear()
    again = built("calibrated", base=digits(0), data=data)
    again.remember(tmp_path / "oracle")
    again.open()
    assert ASKED == []
    assert again.version == first.version
    other = built("calibrated", base=digits(0, scale=2.0), data=data)
    other.remember(tmp_path / "oracle")
    other.open()
    assert len(ASKED) == 60, "another base is another fit"
    assert other.version != first.version


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds 0 pairs"),
        ("{}\n", "holds no pairs"),
        ('{"prompt": "a", "chosen": 1, "rejected": "b"}\n', "holds no pairs"),
        ('{"prompt": "a", "chosen": "1", "rejected": "b", "p": 2}\n', "holds no pairs"),
        ("nonsense\n", "holds no pairs"),
        ('{"prompt": "a", "chosen": "1", "rejected": "2"}\n' * 60, "wrong about most"),
        ('{"prompt": "a", "chosen": "!", "rejected": "2"}\n' * 60, "was judged for 0 of 60 pairs; first: met a !"),
    ],
)
def test_pairs_that_say_nothing_are_refused(tmp_path, content, said):
    (tmp_path / "anchors.jsonl").write_text(content)
    oracle = built("calibrated", base=digits(0), data=str(tmp_path / "anchors.jsonl"))
    with pytest.raises(OracleError, match=said):
        oracle.open()


def test_data_is_found_beside_the_configuration(tmp_path):
    data = anchors(tmp_path, 60)
    oracle = built("calibrated", base=digits(0), data="anchors.jsonl").located([tmp_path])
    assert oracle.data == data


def test_the_calibration_error_by_hand():
    certain, even = np.array([0.9, 0.2]), np.array([0.5, 0.5])
    # Confidence 0.9 and 0.8, one right of two: |1 - 1.7| / 2.
    assert calibration.calibration_error(*calibration.predictions(certain, np.array([1.0, 1.0]))) == pytest.approx(0.35)
    assert calibration.calibration_error(*calibration.predictions(even, np.array([1.0, 0.0]))) == 0
    assert calibration.calibration_error(*calibration.predictions(np.array([1.0, 0.0]), np.array([1.0, 0.0]))) == 0


def test_the_noise_of_a_calibration_error_is_what_the_specification_says():
    """About 0.029 on the mean of 2,000 pairs whose probabilities are spread."""
    probs = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=2000)))
    mean, high = calibration.noise_floor(np.maximum(probs, 1 - probs))
    assert mean == pytest.approx(0.029, abs=0.006)
    assert high == pytest.approx(0.039, abs=0.008)


def test_fits_of_separable_pairs_end():
    fit = calibration.fit(np.array([1.0, 2.0, -1.0]), np.array([1.0, 1.0, 0.0]), intercept=False)
    assert 5 < fit.slope <= 1000
