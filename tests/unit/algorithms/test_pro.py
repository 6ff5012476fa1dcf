from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import LIST, LIST_ROWS, ROWS, evaluate

from onlinerl.algorithms.pro import Pro

VARIANTS = [{}, {"sft_coef": 0.0}]
KNOBS = {"sft_coef": [({}, 0.3)]}


def at_reference(items):
    def cost(item):
        s = [float(x.behavior_logprobs.mean()) for x in item.sequences]
        r = [x.score for x in item.sequences]
        total = 0.0
        for k in range(len(s) - 1):
            own = s[k] * (r[k] - r[-1])
            total += math.log(math.exp(own) + sum(math.exp(s[j] * (r[k] - r[j])) for j in range(k + 1, len(s)))) - own
        return total - 0.05 * (len(s) - 1) ** 2 * float(item.sequences[0].behavior_logprobs.sum())

    return float(np.mean([cost(item) for item in items]))


def test_value_by_hand():
    # s = (-0.5, -2.5, -1) and r = (3, 2, 0): 1.5 + ln(e^-1.5 + e^-2.5 + e^-3) = 0.464368, 5 + ln(e^-5 + e^-2) = 3.048587
    assert evaluate(Pro(sft_coef=0.0), [LIST], LIST_ROWS)[0] == pytest.approx(0.464368 + 3.048587, abs=3e-6)
    assert evaluate(Pro(), [LIST], LIST_ROWS)[0] == pytest.approx(0.464368 + 3.048587 + 0.05 * 4 * 2, abs=3e-6)


def test_of_two_responses_it_is_logistic_in_the_gap_of_the_scores():
    two = replace(LIST, sequences=LIST.sequences[:2])
    assert evaluate(Pro(sft_coef=0.0), [two], ROWS)[0] == pytest.approx(math.log1p(math.exp(-2.0 * 1.0)), rel=1e-6)


def test_equal_scores_cost_the_logarithm_of_the_orders_and_the_best_response_is_pushed_up():
    even = replace(LIST, sequences=tuple(s.with_(score=1.0) for s in LIST.sequences))
    assert evaluate(Pro(sft_coef=0.0), [even], LIST_ROWS)[0] == pytest.approx(math.log(6), rel=1e-6)
    gradient = evaluate(Pro(sft_coef=0.0), [LIST], LIST_ROWS)[1]
    assert gradient[0].max() < 0
    assert torch.isfinite(gradient).all()


def test_reads_no_reference():
    assert not Pro().needs.reference
    assert Pro().reference == "none"
