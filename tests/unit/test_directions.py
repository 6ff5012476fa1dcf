"""Directions that are drawn for each prompt: what is drawn, and how responses are judged in them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onlinerl.config import component
from onlinerl.errors import ConfigError
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Prompt, Query, Verdict
from onlinerl.types.directions import Directions

PAPER = {"helpful": (math.sqrt(0.5), 1.0), "verbose": (-math.sqrt(0.5), math.sqrt(0.5))}
"""Angles from -45 to 45 degrees."""
IDS = [f"prompt {i}" for i in range(2000)]


class Digits(Oracle):
    """The number at one place of each response."""

    place: int = 0

    @property
    def version(self):
        return f"digits-{self.place}"

    def judge(self, queries):
        said = [[float(response.split()[self.place]) for response in query.responses] for query in queries]
        return [Verdict(annotator="digits", oracle_version=self.version, scores=tuple(scores)) for scores in said]


def digits(place: int) -> dict:
    return {"name": f"{__name__}.Digits", "place": place}


def query(*responses: str, name: str = "p") -> Query:
    return Query(prompt=Prompt(id=name, text="what ", token_ids=(1,)), responses=responses)


def directions(bounds=PAPER, **more) -> Directions:
    return Directions(bounds=bounds, text="aim at {direction}", **more)


def built(name: str = "composite", **knobs) -> Oracle:
    return component({"name": name, **knobs}, "oracle", "oracles", Oracle)


def composite(**knobs) -> dict:
    return {"name": "composite", "members": {"a": digits(0), "b": digits(1)}, "combine": "direction", **knobs}


# --- what is drawn ---


@pytest.mark.parametrize(
    "bounds", [PAPER, {f"s{i}": (0.0, 1.0) for i in range(8)}, {"a": (-1.0, -0.2), "b": (-1.0, 1.0), "c": (0.1, 0.9)}]
)
def test_a_direction_has_length_one_and_is_within_its_bounds(bounds):
    for name in IDS[:200]:
        drawn = directions(bounds).of(name)
        assert set(drawn) == set(bounds)
        assert sum(weight**2 for weight in drawn.values()) == pytest.approx(1.0)
        assert all(low <= drawn[key] <= high for key, (low, high) in bounds.items())


def test_all_directions_within_the_bounds_are_equally_probable():
    angles = [math.degrees(math.atan2(drawn["verbose"], drawn["helpful"])) for drawn in map(directions().of, IDS)]
    counts, _ = np.histogram(angles, bins=9, range=(-45, 45))
    expected = len(IDS) / 9
    assert sum((counts - expected) ** 2 / expected) < 26.1  # chi squared of 8 degrees of freedom, p = 0.001


def test_a_direction_follows_from_the_prompt_and_the_seed_whatever_the_order_of_the_scores():
    one = directions()
    assert one.of("x") == directions(dict(reversed(PAPER.items()))).of("x") == directions().of("x")
    assert one.of("x") != one.of("y")
    assert one.of("x") != directions(seed=1).of("x")


def test_what_is_said_is_what_was_drawn_in_hundredths():
    drawn = directions().of("x")
    assert directions().said("x") == f"aim at {_words(drawn)}"
    negative = directions({"a": (-1.0, -0.1), "b": (-1.0, -0.1)})
    a, b = (round(-100 * weight) for weight in negative.of("x").values())
    assert negative.words("x") == f"-a*{a} - b*{b}"


def _words(drawn: dict[str, float]) -> str:
    helpful, verbose = (round(100 * drawn[key]) for key in ("helpful", "verbose"))
    return f"helpful*{helpful} {'-' if verbose < 0 else '+'} verbose*{abs(verbose)}"


# --- what is judged ---


def test_a_score_is_the_weighted_sum_in_the_direction_of_its_prompt():
    oracle = built(**composite(direction_bounds={"b": (-1.0, 1.0)}, means={"a": 1.0}, stds={"b": 2.0}))
    told = oracle.directions
    verdicts = oracle.ask([query("1 2", "4 -3", name=name) for name in ("x", "y")])
    for name, verdict in zip(("x", "y"), verdicts, strict=True):
        v = told.of(name)
        assert verdict.scores == pytest.approx((0.0 * v["a"] + 1.0 * v["b"], 3.0 * v["a"] - 1.5 * v["b"]))
        assert verdict.components == {"a": (1.0, 4.0), "b": (2.0, -3.0)}
        assert verdict.raw == f"direction: {told.words(name)}"
    assert verdicts[0].scores != verdicts[1].scores


def test_members_may_be_written_in_any_order():
    forth, back = (
        composite(members=dict(order)) for order in ([("a", digits(0)), ("b", digits(1))], [("b", digits(1)), ("a", digits(0))])
    )
    one, other = (built(**each).ask([query("1 2", "4 -3")])[0] for each in (forth, back))
    assert one.scores == pytest.approx(other.scores)


def test_another_direction_is_another_oracle():
    versions = {
        built(**composite(**knobs)).version for knobs in ({}, {"direction_seed": 1}, {"direction_bounds": {"a": (0.5, 1.0)}})
    }
    assert len(versions) == 3
    assert built(**composite()).version == built(**composite(direction_text="{direction}", direction_place="user")).version


@pytest.mark.parametrize(
    ("knobs", "field", "cause"),
    [
        ({"combine": "sum", "direction_seed": 1}, "direction_seed", "belongs to combine=direction"),
        ({"combine": "sum", "direction_text": "{direction}"}, "direction_text", "belongs to combine=direction"),
        ({"combine": "sum", "direction_place": "user"}, "direction_place", "belongs to combine=direction"),
        ({"combine": "min", "direction_bounds": {"a": (0.0, 1.0)}}, "direction_bounds", "belongs to combine=direction"),
        ({"weights": {"a": 2.0}}, "weights", "are drawn for each prompt"),
        ({"members": {"a": digits(0)}}, "members", "one direction"),
        ({"direction_text": "please all"}, "direction_text", "does not say"),
        ({"direction_bounds": {"c": (0.0, 1.0)}}, "direction_bounds", "'c', which is no member"),
        ({"direction_bounds": {"a": (1.0, 0.0)}}, "direction_bounds", "of a are 1 and 0"),
        ({"direction_bounds": {"a": (0.0, 1.5)}}, "direction_bounds", "of a are 0 and 1.5"),
        ({"direction_bounds": {"a": (0.0, 0.1), "b": (0.0, 0.1)}}, "direction_bounds", "none is within"),
    ],
)
def test_what_cannot_be_meant_is_refused(knobs, field, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        built(**composite(**knobs))
    assert (error.value.field, bool(error.value.fix)) == (f"oracle.{field}", True)


def test_wrappers_pass_it_on():
    told = built(**composite()).directions
    assert told is not None
    for wrapper in ({"name": "swapped"}, {"name": "noisy", "flip_rate": 0.1}):
        assert built(**wrapper, base=composite()).directions == told
    assert built(**composite(combine="sum")).directions is None
    assert "an exported model expects one too" in built(**composite()).remarks[-1]
