"""The step-0 self-test: which items, which limits, and what the toy learner says. The real learner's is in integration."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.grpo import Grpo
from onlinerl.algorithms.inpo import Inpo
from onlinerl.algorithms.tdpo2 import Tdpo2
from onlinerl.controller import self_test
from onlinerl.errors import LearnerError
from onlinerl.learners._self_test import Moments
from onlinerl.learners.toy import ToyLearner
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import SelfTest, TrainItem, TrainSequence

GOOD = SelfTest(
    loss=math.log(2),
    repeat_kl=0.0,
    stored_loss=math.log(2),
    stored_loss_slope=5.0,
    stored_gaps={"reference_logprobs": 1e-5},
    noise=1e-5,
    stored_tilts={"reference_logprobs": 1e-5},
    base_gap=1e-5,
)


@pytest.mark.parametrize(
    ("changes", "said", "field"),
    [
        ({"loss": math.log(2) + 0.002}, "with policy = reference the loss is", "algorithm"),
        ({"loss": math.nan}, "before the first step the loss is nan on the policy's own", "algorithm.name"),
        ({"repeat_kl": -0.01}, "two passes of one policy", "learner"),
        ({"repeat_kl": math.nan}, "two passes of one policy", "learner"),
        (
            {"stored_gaps": {"reference_logprobs": 1e-5, "old_logprobs": 0.03}},
            r"the stored old_logprobs differ .* by 0\.0300",
            "learner",
        ),
        ({"stored_gaps": {"values": math.nan}}, "the stored values differ ", "learner"),
        (
            {"stored_gaps": {"old_logprobs": 0.11}, "noise": 0.05},
            r"the stored old_logprobs differ .* by 0\.1100 per token \(limit 0\.1 ",
            "learner",
        ),
        (
            {"stored_tilts": {"old_logprobs": 0.03}, "noise": 0.05},
            "the more, the less probable a token is: by 0\\.03",
            "learner",
        ),
        ({"stored_tilts": {"old_logprobs": math.nan}}, "the less probable a token is", "learner"),
        ({"noise": 0.3}, "if its batch is padded further", "learner.attn_implementation"),
        ({"noise": math.nan}, "if its batch is padded further", "learner.attn_implementation"),
        ({"stored_loss": math.log(2) + 0.2}, "with the stored reference the loss is", "learner"),
        ({"reference_kl": 0.002, "loss": 0.8}, r"the KL between the policy and the reference beside it is 0\.0020", "model"),
        ({"reference_kl": math.nan}, "the KL between the policy and the reference beside it is nan", "model"),
        ({"base_gap": 0.03}, r"policy and base model differ by 0\.0300", "model"),
        ({"base_gap": math.nan}, "policy and base model differ", "model"),
    ],
)
def test_what_stops_a_run(changes, said, field):
    self_test.check(GOOD, math.log(2), "bfloat16")

    with pytest.raises(LearnerError, match=said) as error:
        self_test.check(replace(GOOD, **changes), math.log(2), "bfloat16")
    assert error.value.field == field


def test_a_large_loss_may_be_off_by_what_single_precision_rounds():
    """The targets of `inpo` and `sppo_hard` are squares of hundreds of nats; 27777.78 is no number of single precision."""
    expected = (0.5 / 0.003) ** 2
    large = replace(GOOD, loss=27777.779296875, stored_loss=27777.779296875)
    self_test.check(large, expected, "float32")
    with pytest.raises(LearnerError, match="with policy = reference the loss is"):
        self_test.check(replace(large, loss=expected * (1 + 3e-6)), expected, "float32")


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"stored_loss": math.inf}])
def test_a_loss_that_is_not_finite_stops_a_run_whose_formula_says_nothing(changes):
    self_test.check(GOOD, None, "float32")
    with pytest.raises(LearnerError, match="before the first step the loss is") as error:
        self_test.check(replace(GOOD, **changes), None, "float32")
    assert error.value.field == "algorithm.name"
    with pytest.raises(LearnerError, match=r"scores as large as 1e\+308 overflow") as error:
        self_test.check(replace(GOOD, **changes), None, "float32", largest_score=1e308)
    assert error.value.field == "oracle"


def test_limits_follow_the_dtype():
    rounded = replace(GOOD, stored_gaps={"old_logprobs": 0.005}, stored_loss=math.log(2) + 0.02)
    self_test.check(rounded, math.log(2), "bfloat16")
    with pytest.raises(LearnerError, match=r"limit 0\.001 in float32"):
        self_test.check(rounded, math.log(2), "float32")


def test_rounding_that_goes_far_is_no_fault():
    """Prompts of 400 tokens in bfloat16: the stored arrays are off by as much as the same pass with other padding."""
    far = {"stored_gaps": {"old_logprobs": 0.056}, "noise": 0.049, "base_gap": 0.0286, "stored_tilts": {"old_logprobs": 0.002}}
    self_test.check(replace(GOOD, **far), math.log(2), "bfloat16")


def test_a_kl_may_be_what_the_square_of_the_rounding_allows():
    far = replace(GOOD, noise=0.1, reference_kl=0.03)
    self_test.check(far, math.log(2), "bfloat16")
    with pytest.raises(LearnerError, match="the reference beside it"):
        self_test.check(replace(far, noise=0.05), math.log(2), "bfloat16")


def test_an_algorithm_without_a_fixed_loss_is_asked_for_none():
    self_test.check(replace(GOOD, loss=7.0, stored_loss=9.0), None, "float32")


def item(prompt: str, *lengths: int) -> TrainItem:
    return TrainItem(
        prompt_id=prompt, sequences=tuple(TrainSequence(prompt_ids=(1,), response_ids=tuple(range(n))) for n in lengths)
    )


def test_long_responses_of_different_prompts_are_chosen():
    group = [item("a", n) for n in (1, 9, 9, 9)]
    many = [item(f"p{n:02}", n, 20) for n in range(2, 12)]
    chosen = self_test.choose([*group, *many])

    assert len(chosen) == self_test.ITEMS
    assert [i.prompt_id for i in chosen] == ["p11", "p10", "a", "p09", "p08", "p07", "p06", "p05"]
    assert self_test.choose(group) == [group[1], group[2], group[3], group[0]]


@pytest.mark.parametrize(
    ("algorithm", "name", "temperature"),
    [(Dpo(), "reference_logprobs", 1.0), (Inpo(), "anchor_logprobs", 1.0), (Grpo(), "old_logprobs", 0.7)],
)
@pytest.mark.parametrize("spoiled", ["nothing", "shifted", "permuted", "temperature"])
def test_the_toy_learner_notices_too(algorithm: Algorithm, name: str, temperature: float, spoiled: str) -> None:
    learner = ToyLearner(7, algorithm, "base", temperature)
    with torch.no_grad():
        learner.logits.copy_(torch.linspace(-2, 2, 7))
    rng = np.random.default_rng(0)
    sequences = [
        TrainSequence(prompt_ids=(1,), response_ids=tuple(rng.integers(0, 7, 20)), advantages=np.ones(20, np.float32))
        for _ in range(8)
    ]
    scores = learner.logprobs(sequences, temperature=temperature * (1.1 if spoiled == "temperature" else 1.0))
    if spoiled == "shifted":
        scores = [np.roll(s, 1) for s in scores]
    if spoiled == "permuted":
        scores = scores[1:] + scores[:1]
    sound = learner.logprobs(sequences, temperature=temperature)
    sequences = [
        s.with_(**{"reference_logprobs": own, "behavior_logprobs": a, name: a})
        for s, a, own in zip(sequences, scores, sound, strict=True)
    ]
    items = [TrainItem(prompt_id=str(i), sequences=tuple(sequences[2 * i : 2 * i + 2])) for i in range(4)]

    result = learner.self_test(items, "base")

    assert (result.stored_gaps[name] > self_test.GAP["bfloat16"]) == (spoiled != "nothing")
    assert (result.stored_tilts[name] > self_test.GAP["bfloat16"]) == (spoiled != "nothing")
    assert {n for n, gap in result.stored_gaps.items() if gap > 1e-6} == {name} - ({name} if spoiled == "nothing" else set())
    assert result.noise == 0
    if spoiled != "nothing":
        with pytest.raises(LearnerError, match=f"the stored {name} differ"):
            self_test.check(result, None, "float32")


@pytest.mark.parametrize(("wrong", "kl"), [(False, 0.0), (True, 0.130812)])
def test_the_toy_learner_notices_a_reference_that_is_another_model(tmp_path: Path, wrong: bool, kl: float) -> None:
    """(1/4, 3/4) in the place of even odds: 0.25 ln 0.5 + 0.75 ln 1.5."""
    np.save(tmp_path / "logits.npy", np.array([0.0, math.log(3.0)]))
    learner = ToyLearner(2, Tdpo2(), "base")
    if wrong:
        learner.set_reference(str(tmp_path))
    even = np.full(4, -math.log(2), np.float32)
    sequences = [
        TrainSequence(prompt_ids=(1,), response_ids=ids, reference_logprobs=even) for ids in ((0, 1, 0, 1), (1, 1, 0, 0))
    ]

    result = learner.self_test([TrainItem(prompt_id="p", sequences=tuple(sequences))], "base")

    assert result.reference_kl == pytest.approx(kl, abs=1e-6)
    if wrong:
        with pytest.raises(LearnerError, match="the reference beside it"):
            self_test.check(result, Tdpo2().loss_at_reference, "float32")
    else:
        self_test.check(result, Tdpo2().loss_at_reference, "float32")


@pytest.mark.parametrize(("temperature", "caught"), [(1.0, False), (0.98, True), (1.02, True)])
def test_a_temperature_shows_under_the_rounding_of_long_prompts(temperature: float, caught: bool) -> None:
    """Of 0.05 nats per token, as was measured: more than the temperature makes of it, so that a limit on the gap would miss it."""
    rng = np.random.default_rng(0)
    said = -rng.exponential(2.0, 500)
    stored = said + (1 / temperature - 1) * (said + 1.0) + rng.normal(0.0, 0.06, 500)
    d = stored - said
    moments = Moments(n=500, d=d.sum(), c=said.sum(), dc=(d * said).sum(), cc=(said * said).sum())
    assert abs(d).mean() < 2 * 0.05
    assert (moments.tilt(0.05) > self_test.GAP["bfloat16"]) == caught
