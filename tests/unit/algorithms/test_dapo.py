from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_batches import CLIP_KNOBS, IMPORTANCE_KNOBS, evaluate, judged, sequence, single, spread, trained, values
from pydantic import ValidationError
from trl_losses import grpo_loss

from onlinerl.algorithms.dapo import Dapo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.types import Plan

SHAPED = {"max_length": 6, "overlong_buffer_len": 4}
VARIANTS = [{}, SHAPED, {"std_norm": "none", "agg": "seq_mean_token_mean", "kl_coef": 0.04, "dual_clip": None}]
KNOBS = (
    CLIP_KNOBS
    | IMPORTANCE_KNOBS
    | {
        "kl_coef": [({}, 0.5)],
        "std_norm": [({}, "batch"), ({}, "none")],
        "agg": [({}, "seq_mean_token_mean")],
        "max_length": [(SHAPED, 5)],
        "overlong_buffer_len": [(SHAPED, 2)],
        "overlong_penalty_factor": [(SHAPED, 3.0)],
    }
)
PAPER = Dapo(max_length=20480, overlong_buffer_len=4096)
LENGTHS = [4, 1, 2]


def at_reference(items):
    tokens = np.concatenate([item.sequences[0].advantages for item in items])
    return -tokens.mean()


def steps(algorithm, lengths, rows, old):
    """Loss and gradient of one optimizer step over one group."""
    kept = {"old_logprobs": old, "behavior_logprobs": old}
    return evaluate(algorithm, trained(algorithm, [judged(lengths, scores=(1.0, -1.0, -1.0))], **kept), rows)


def test_value_by_hand():
    # Ratios 1.5 (clipped to 1.28) and 1 with A = 1; ratio 20 with A = -2, which loses 10 times 2: -1.28, -1 and 20 over 3 tokens
    items = [
        single(
            sequence(2, old_logprobs=[-1.0 - np.log(1.5), -1.0], behavior_logprobs=[-1.0 - np.log(1.5), -1.0], advantages=1.0)
        ),
        single(sequence(1, old_logprobs=-1.0 - np.log(20.0), behavior_logprobs=-1.0 - np.log(20.0), advantages=-2.0)),
    ]
    assert evaluate(Dapo(), items, [-1.0, -1.0])[0] == pytest.approx((-1.28 - 1.0 + 20.0) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("length", "lost"), [(1, 0.0), (16384, 0.0), (17408, 0.25), (18432, 0.5), (20480, 1.0), (20481, 1.0), (40000, 1.0)]
)
def test_the_penalty_of_the_paper_s_lengths(length, lost):
    response = sequence(1).with_(response_ids=range(length), score=1.0)
    assert PAPER.score(response) == 1.0 - lost
    assert Dapo().score(response) == 1.0


def test_advantages_are_those_of_the_shaped_scores():
    # Lengths 4, 1 and 2 with a penalty from 2 to 6 tokens: 1 - 0.5, -1 and -1; the mean is -0.5, the deviations 1, -0.5 and -0.5, and
    # their unbiased standard deviation sqrt(1.5 / 2)
    items = trained(Dapo(**SHAPED), [judged(LENGTHS, scores=(1.0, -1.0, -1.0))])
    got = [item.sequences[0].advantages[0] for item in items]
    assert got == pytest.approx([1 / 0.75**0.5, -0.5 / 0.75**0.5, -0.5 / 0.75**0.5], rel=1e-5)
    assert [item.sequences[0].score for item in items] == [1.0, -1.0, -1.0], "what the oracle said stays what it said"
    assert Dapo(**SHAPED).figures(items) == {"overlong_penalty": pytest.approx(0.5 / 3)}
    assert Dapo().figures(items) == {}


def test_with_equal_bounds_and_lengths_it_is_grpo():
    rng = np.random.default_rng(0)
    rows, old = (-1.0 + 0.4 * rng.standard_normal((3, 4)) for _ in range(2))
    equal = {"clip_range_high": 0.2, "dual_clip": None}
    loss, gradient, _, _ = steps(Dapo(**equal), [4, 4, 4], rows, old)
    for other in (Grpo(), Dapo(**equal, agg="seq_mean_token_mean"), Dapo(**equal, max_length=8, overlong_buffer_len=4)):
        expected = steps(other, [4, 4, 4], rows, old)
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert (gradient - expected[1]).abs().max() < 1e-7
    uneven = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    before = [row[:length] for row, length in zip(old, LENGTHS, strict=True)]
    assert steps(Dapo(**equal), LENGTHS, uneven, before)[0] != pytest.approx(
        steps(Grpo(), LENGTHS, uneven, before)[0], rel=1e-3
    )


@pytest.mark.parametrize("knobs", [{"max_length": 8}, {"overlong_buffer_len": 8}, {"max_length": 8, "overlong_buffer_len": 9}])
def test_a_penalty_that_says_only_half_is_refused(knobs):
    with pytest.raises(ValidationError, match="max_length"):
        Dapo(**knobs)


def test_a_penalty_that_no_response_is_long_enough_for_is_refused():
    def objection(max_new_tokens):
        return PAPER.objection(Plan(iterations=1, references=(None,), max_new_tokens=max_new_tokens))

    assert objection(20480) is None
    assert objection(16385) is None
    found = objection(16384)
    assert found.field == "algorithm.max_length"
    assert "only responses of more than 16384 tokens are penalised" in found.cause
    assert found.fix == "set it to 16384"


def test_of_given_advantages_agrees_with_trl():
    """Ratios far enough from 1 for both clips and for the bound of negative advantages."""
    rng, lengths, algorithm = np.random.default_rng(1), (5, 2, 3), Dapo(dual_clip=1.3)
    old = [-1.0 + 0.4 * rng.standard_normal(n) for n in lengths]
    items = trained(algorithm, [judged(lengths, scores=(1.0, -0.5, 0.25))], old_logprobs=old, behavior_logprobs=old)
    rows = [-1.0 + 0.4 * rng.standard_normal(n) for n in lengths]
    loss, gradient, out, batch = evaluate(algorithm, items, rows)
    assert values(out)["clip_high"] > 0
    logprobs = spread(rows, batch).nan_to_num().requires_grad_()
    expected = grpo_loss(
        logprobs,
        batch.old_logprobs_BT.double(),
        batch.advantages_BT[:, 0].double(),
        batch.mask_BT,
        agg="dapo",
        clip_range_high=0.28,
        dual_clip=1.3,
    )
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], atol=1e-7)
