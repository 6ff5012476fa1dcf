from __future__ import annotations

import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, MARGIN_KNOBS, ROWS, evaluate
from trl_losses import assert_agrees_with_dpo

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.dpo_nll import DpoNll

VARIANTS = [{}, {"nll_norm": "sum", "nll_coef": 5e-5, "beta": 0.01}]
KNOBS = MARGIN_KNOBS | {"nll_norm": [({}, "sum"), ({}, "batch_tokens")]}


def at_reference(items):
    chosen = [item.sequences[0].behavior_logprobs for item in items]
    return 0.69314718 - sum(float(logprobs.mean()) for logprobs in chosen) / len(chosen)


@pytest.mark.parametrize(("knobs", "nll"), [({}, 0.5), ({"nll_norm": "sum"}, 2.0), ({"nll_coef": 3.0}, 1.5)])
def test_value_by_hand(knobs, nll):
    assert evaluate(DpoNll(**knobs), [ITEM], ROWS)[0] == pytest.approx(F_PLUS + nll, rel=1e-7)


def test_without_the_likelihood_it_is_dpo_and_with_it_the_rejected_side_gets_the_same_gradient():
    without, dpo, with_it = (evaluate(a, [ITEM], ROWS) for a in (DpoNll(nll_coef=0.0), Dpo(), DpoNll()))
    assert without[0] == dpo[0]
    assert torch.equal(without[1], dpo[1])
    assert torch.equal(with_it[1][1], dpo[1][1])


def test_of_one_pair_agrees_with_trl():
    """For one pair: TRL's likelihood is the mean over the tokens of the batch."""
    assert_agrees_with_dpo(DpoNll(nll_coef=0.7), {"sigmoid": 1.0, "sft": 0.7}, 1, beta=0.1)
