from __future__ import annotations

import math

import pytest
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate
from trl_losses import assert_agrees_with_dpo

from onlinerl import config as configuration
from onlinerl.algorithms.rso import Rso

VARIANTS = [{}, {"loss_type": "hinge_norm"}]
KNOBS = MARGIN_KNOBS | {"loss_type": [({}, "hinge_norm")]}


def at_reference(items):
    return math.log(2)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [({}, math.log(1 + math.exp(-0.15))), ({"loss_type": "hinge_norm"}, 0.85), ({"loss_type": "hinge_norm", "beta": 0.5}, 0.0)],
)
def test_value_by_hand(knobs, expected):
    assert evaluate(Rso(**knobs), [ITEM], ROWS)[0] == pytest.approx(expected, rel=1e-7)  # z = 0.05 * 3 and 0.5 * 3


def test_its_pairs_are_drawn_by_rejection_unless_others_are_asked_for():
    tree = {
        "name": "demo",
        "model": "org/name",
        "iterations": 1,
        "algorithm": {"name": "rso"},
        "oracle": {"name": "sentiment"},
        "prompts": {"train": "a", "heldout": "b"},
    }

    def builder(**more):
        config = configuration.parse(tree | more)
        return configuration.pair_builder(config), configuration.flatten(configuration.loading.resolved(config))

    found, stored = builder()
    assert (type(found).__name__, found.accept, stored["pairing.name"], stored["pairing.beta"]) == ("Rso", 8, "rso", 0.5)
    assert builder(pairing={"accept": 4})[0].accept == 4
    assert type(builder(pairing={"name": "ranked"})[0]).__name__ == "Ranked"
    assert type(builder(algorithm={"name": "dpo"})[0]).__name__ == "BestWorst"


def test_agrees_with_trl():
    assert_agrees_with_dpo(Rso(beta=0.3), {"sigmoid": 1.0}, beta=0.3)
    assert_agrees_with_dpo(Rso(beta=0.3, loss_type="hinge_norm"), {"hinge": 1.0}, beta=0.3)
