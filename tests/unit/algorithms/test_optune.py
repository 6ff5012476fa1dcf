from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence
from pydantic import ValidationError

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.optune import Optune

VARIANTS = [{}]
KNOBS = MARGIN_KNOBS | {
    "gap_scale": [({}, 3.0)],
    "pair_weights": [
        *(({}, how) for how in ("equal", "score_gap", "certainty", "dcg")),
        ({"strength_thresholds": [0.5]}, "strength"),
        ({"pair_weights": "equal"}, "sigmoid_gap"),
    ],
}
OTHER = pair(sequence(3, score=0.5), sequence(1, 50, score=0.5))


def at_reference(items):
    return math.log(2) * np.mean([item.weight for item in items])


def test_value_by_hand():
    # Gaps of 1 and 0: sigmoids 0.7310586 and 0.5, whose mean is 0.6155293; the weights are 1.1876910 and 0.8123090
    items = list(Optune().prepare([ITEM, OTHER]))
    assert [item.weight for item in items] == pytest.approx([1.1876910, 0.8123090], rel=1e-6)
    expected = (1.1876910 * F_PLUS + 0.8123090 * math.log(2)) / 2
    assert evaluate(Optune(), items, [*ROWS, 0.0, 0.0])[0] == pytest.approx(expected, rel=1e-6)


def test_a_scale_of_zero_is_dpo():
    one, other = (
        evaluate(algorithm, list(algorithm.prepare([ITEM, OTHER])), [*ROWS, 0.0, 0.0])
        for algorithm in (Optune(gap_scale=0.0), Dpo())
    )
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])


def test_a_huge_gap_saturates():
    items = [pair(sequence(1, score=gap), sequence(1, 50, score=0.0)) for gap in (1e6, -1e6)]
    assert [item.weight for item in Optune().prepare(items)] == pytest.approx([2.0, 0.0])


def test_a_scale_that_nothing_reads_is_refused():
    with pytest.raises(ValidationError, match="only pair_weights=sigmoid_gap reads it"):
        Optune(gap_scale=2.0, pair_weights="equal")
