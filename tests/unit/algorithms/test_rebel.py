from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair

from onlinerl.algorithms.rebel import Rebel
from onlinerl.types.plan import Plan

VARIANTS = [{}, {"eta": 0.1}, {"length_norm": True}, {"kl_coef": 0.2}]
KNOBS = PAIR_KNOBS | {"eta": [({}, 0.3)], "length_norm": [({}, True)], "kl_coef": [({}, 0.5)]}


def at_reference(items):
    return float(np.mean([(item.sequences[0].score - item.sequences[1].score) ** 2 for item in items]))


@pytest.mark.parametrize(("eta", "expected"), [(1.0, 4.0), (2.0, 0.25), (3.0, 0.0)])
def test_value_by_hand(eta, expected):
    """h = 3, and the scores are 1.5 and 0.5."""
    assert evaluate(Rebel(eta=eta), [ITEM], ROWS)[0] == pytest.approx(expected, abs=1e-9)


def test_means_over_tokens_by_hand():
    assert evaluate(Rebel(eta=0.5, length_norm=True), [ITEM], ROWS)[0] == pytest.approx((1.0 / 0.5 - 1.0) ** 2)


def test_the_distance_of_the_iterate_from_the_base_model_is_taken_off_the_scores():
    """The base model is 0.75 nats a token below the iterate on 4 tokens and 1.5 above it on 2: rewards of 1.5 - 0.3 and 0.5 + 0.3."""
    levels = zip(ITEM.sequences, (-1.75, -0.5), strict=True)
    item = pair(*(s.with_(anchor_logprobs=np.full(len(s.response_ids), level, np.float32)) for s, level in levels))
    loss, gradient, _, _ = evaluate(Rebel(kl_coef=0.1), [item], ROWS)
    assert loss == pytest.approx((3.0 - 0.4) ** 2, rel=1e-6)
    assert gradient[0, 0].item() == pytest.approx(2 * (3.0 - 0.4), rel=1e-6), "nothing of it through the reward"
    assert evaluate(Rebel(), [item], ROWS)[0] == pytest.approx(4.0)
    assert (Rebel(kl_coef=0.1).needs.anchor, Rebel().needs.anchor) == (True, False)
    with pytest.raises(ValueError, match="anchor_logprobs_BT"):
        evaluate(Rebel(kl_coef=0.1), [pair(ITEM.sequences[0].with_(anchor_logprobs=None), ITEM.sequences[1])], ROWS)


def test_a_price_of_a_distance_that_is_always_0_is_refused():
    found = Rebel(kl_coef=0.1).objection(Plan(iterations=2, references=(0, 0)))
    assert found is not None
    assert (found.field, "no distance" in found.cause) == ("algorithm.kl_coef", True)
    assert Rebel(kl_coef=0.1).objection(Plan(iterations=2, references=(0, 1))) is None
    assert Rebel().objection(Plan(iterations=2, references=(0, 0))) is None


def test_at_the_reference_it_is_the_squared_gap():
    assert evaluate(Rebel(), [ITEM], [-1.0, -2.0])[0] == pytest.approx(1.0)


def test_a_shift_of_all_scores_of_a_prompt_changes_nothing():
    shifted = pair(*(s.with_(score=s.score + 64.0) for s in ITEM.sequences))
    one, other = (evaluate(Rebel(), [item], ROWS) for item in (ITEM, shifted))
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
