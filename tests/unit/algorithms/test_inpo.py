from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import ITEM, PAIR_KNOBS, ROWS, evaluate, pair, sequence, values

from onlinerl.algorithms.inpo import Inpo
from onlinerl.algorithms.ipo import Ipo
from onlinerl.types.plan import Plan

VARIANTS = [
    {"eta": 0.5},
    {"eta": 0.5, "anchor_weight": 0.0},
    {},
    {"eta": 0.5, "anchor_weight": 1.0, "nll_coef": 0.5, "length_norm": True},
]
KNOBS = PAIR_KNOBS | {"eta": [({}, 0.1)], "anchor_weight": [({}, 0.0), ({}, 0.8)], "length_norm": [({}, True)]}


def at_reference(items):
    return 1.0


def anchored(one: float, other: float):
    """`ITEM` with what the base model says per token of each response."""
    return pair(
        *(
            s.with_(anchor_logprobs=np.full(len(s.response_ids), level, np.float32))
            for s, level in zip(ITEM.sequences, (one, other), strict=True)
        )
    )


def test_value_by_hand():
    # h_t = 3. The base model is 0.75 nats a token below the iterate on 4 tokens and 1.5 above it on 2: -3 - 3 = -6.
    item = anchored(-1.75, -0.5)
    # A third of it: 3 + 2 = 5, against a target of 1 / (2 * 0.25) = 2
    assert evaluate(Inpo(eta=0.25), [item], ROWS)[0] == pytest.approx(9.0)
    # All of it: 3 + 6 = 9, which is log pi(w) / pi(l) - log base(w) / base(l) = -2 + 5 + 7 - 1
    assert evaluate(Inpo(eta=0.25, anchor_weight=1.0), [item], ROWS)[0] == pytest.approx(49.0)
    # At pi = pi_t = base with the published eta: (1 / 0.01)^2
    zeros = pair(sequence(3), sequence(2, 50))
    assert evaluate(Inpo(), [zeros], [0.0, 0.0])[0] == pytest.approx(10000.0)
    assert Inpo().loss_at_reference == pytest.approx(10000.0)


def test_means_over_tokens_by_hand():
    # Half a nat per token either way, and against all of the base model 0.5 + 0.75 and -0.5 - 1.5: 1 and 3.25 against a target of 2
    assert evaluate(Inpo(eta=0.25, anchor_weight=0.0, length_norm=True), [anchored(-1.75, -0.5)], ROWS)[0] == pytest.approx(1.0)
    assert evaluate(Inpo(eta=0.25, anchor_weight=1.0, length_norm=True), [anchored(-1.75, -0.5)], ROWS)[0] == pytest.approx(
        1.25**2
    )


def test_without_the_base_model_it_is_the_square_of_the_margin_against_the_iterate():
    # (h_t - 1 / (2 eta))^2 = (3 - 1 / 0.4)^2
    algorithm = Inpo(eta=0.2, anchor_weight=0.0)
    assert not algorithm.needs.anchor
    item = pair(*(s.with_(anchor_logprobs=None) for s in ITEM.sequences))
    assert evaluate(algorithm, [item], ROWS)[0] == pytest.approx(0.25)
    assert evaluate(algorithm, [item], ROWS)[0] == pytest.approx(evaluate(Ipo(tau=0.2), [item], ROWS)[0])


def test_where_iterate_and_base_model_agree_the_weight_changes_nothing():
    item = anchored(-1.0, -2.0)  # as the reference of ITEM
    losses = [evaluate(Inpo(eta=0.25, anchor_weight=a), [item], ROWS)[0] for a in (0.0, 0.3, 1.0)]
    assert losses == pytest.approx([1.0, 1.0, 1.0])


def test_gradient_leads_the_margin_to_its_target():
    # Margin 5 at eta 0.25: slope 2 (5 - 2) = 6 on each token of the chosen response, -6 on the rejected one's
    _, gradient, _, batch = evaluate(Inpo(eta=0.25), [anchored(-1.75, -0.5)], ROWS)
    assert gradient[0].tolist() == pytest.approx([6.0] * 4)
    assert gradient[1, :2].tolist() == pytest.approx([-6.0] * 2)
    assert not gradient[1, 2:].any()
    assert torch.equal(gradient != 0, batch.mask_BT)


def test_metrics_show_how_much_of_the_target_is_reached():
    metrics = values(evaluate(Inpo(eta=0.25), [anchored(-1.75, -0.5)], ROWS)[2])
    assert metrics["z"] == pytest.approx(2.5)
    assert metrics["margin"] == pytest.approx(3.0)  # against the iterate


def test_the_base_model_is_read():
    item = pair(ITEM.sequences[0].with_(anchor_logprobs=None), ITEM.sequences[1])
    with pytest.raises(ValueError, match="anchor_logprobs_BT"):
        evaluate(Inpo(), [item], ROWS)


def test_a_fixed_reference_makes_the_two_anchors_one():
    (said,) = Inpo().remarks(Plan(iterations=3, references=(0, 0, 0)))
    assert "anchor_weight changes nothing" in said
    assert Inpo().remarks(Plan(iterations=3, references=(0, 1, 2))) == []
    assert Inpo(anchor_weight=0.0).remarks(Plan(iterations=3, references=(0, 0, 0))) == []
