"""Nash-MD on a game of three answers that beat each other in a circle, with exact expectations of its own gradient.

"Nash Learning from Human Feedback", proposition 5.2: the mixture of policy and reference becomes the Nash policy of the game in which a nat of KL
to the reference costs tau / (1 - mixture_coef).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_nash import ANSWERS, CYCLE, LADDER, NASH, START, gap, regularized

from onlinerl.algorithms.nash_md import NashMd
from onlinerl.batch import Outputs
from onlinerl.ops.batching import collate
from onlinerl.types import Group, Judged, Prompt, Rollout, Sampling, Verdict

TAU = 0.2


def fight(own: int, other: int, game: np.ndarray) -> Judged:
    """A response of the policy against one of the mixture."""
    rollouts = tuple(
        Rollout(
            token_ids=ANSWERS[place],
            logprobs=(0.0,),
            text="",
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(),
            seed=seed,
            source=source,
        )
        for seed, (place, source) in enumerate([(own, "policy"), (other, "mixture")])
    )
    won = game[own, other]
    verdict = Verdict(annotator="t", oracle_version="1", preferences=((math.nan, won), (1.0 - won, math.nan)))
    return Judged(group=Group(prompt=Prompt(id="p", text="", token_ids=(7,)), rollouts=rollouts), verdict=verdict)


def mixed(policy: np.ndarray, weight: float) -> np.ndarray:
    weights = policy ** (1.0 - weight) * START**weight
    return weights / weights.sum()


def play(algorithm: NashMd, steps: int = 1500, rate: float = 1.0, game: np.ndarray = CYCLE) -> np.ndarray:
    """The policy after so many steps along the expected gradient of its logits."""
    places = [(own, other) for own in range(3) for other in range(3)]
    items = [item for own, other in places for item in algorithm.items(fight(own, other, game), [])[0]]
    reference = [np.float32([math.log(START[own])]) for own, _ in places]
    filled = [
        dataclasses.replace(i, sequences=(i.sequences[0].with_(reference_logprobs=r),))
        for i, r in zip(items, reference, strict=True)
    ]
    batch, rows = collate(filled), torch.tensor([own for own, _ in places])
    logits = torch.tensor(START).log()
    for _ in range(steps):
        variable = logits.clone().requires_grad_()
        logprobs = torch.log_softmax(variable, dim=0)
        policy = logprobs.detach().exp().numpy()
        often = torch.tensor(np.outer(policy, mixed(policy, algorithm.mixture_coef)).flatten())
        loss = algorithm.loss(Outputs(logprobs_BT=logprobs[rows][:, None]), dataclasses.replace(batch, weight_B=often)).total
        (gradient,) = torch.autograd.grad(loss, variable)
        logits = logits - rate * gradient
    return torch.softmax(logits, dim=0).numpy()


@pytest.mark.parametrize("weight", [0.0, 0.125, 0.5])
def test_the_mixture_becomes_the_nash_policy_of_the_regularized_game(weight):
    policy = play(NashMd(mixture_coef=weight, tau=TAU))
    opponent = mixed(policy, weight)
    assert opponent == pytest.approx(regularized(CYCLE, TAU / (1.0 - weight)), abs=1e-4)
    fixed = START * np.exp(CYCLE @ opponent / TAU)
    assert policy == pytest.approx(fixed / fixed.sum(), abs=1e-4)
    if weight:
        assert abs(policy - opponent).max() > 0.02, "and the policy is another one"
    assert gap(opponent) < gap(START)
    assert gap(opponent) > 0.02, "which is not Nash of the game itself"


def test_against_the_reference_it_is_the_best_response():
    policy = play(NashMd(mixture_coef=1.0, tau=TAU))
    best = START * np.exp(CYCLE @ START / TAU)
    assert policy == pytest.approx(best / best.sum(), abs=1e-4)


def test_the_cheaper_the_kl_the_nearer_nash():
    near, far = (mixed(play(NashMd(mixture_coef=0.125, tau=tau), steps=4000), 0.125) for tau in (0.05, 0.4))
    assert gap(near) < gap(far)
    assert abs(near - NASH).max() < abs(far - NASH).max()


def test_where_one_answer_beats_all_others_it_gets_most_of_the_mass():
    """With a Bradley-Terry oracle it has the same winner as those of `test_nash.py`."""
    opponent = mixed(play(NashMd(mixture_coef=0.125, tau=0.05), steps=4000, game=LADDER), 0.125)
    assert opponent == pytest.approx(regularized(LADDER, 0.05 / 0.875), abs=5e-3)  # it gets there slowly
    assert opponent[0] > 0.98


def test_an_opponent_that_is_not_the_mixture_would_be_noticed(monkeypatch):
    """The fault of a coin flip between the two models, whose mixture is arithmetic."""

    def arithmetic(policy, weight):
        return (1.0 - weight) * policy + weight * START

    plain = play(NashMd(mixture_coef=0.5, tau=TAU))
    monkeypatch.setitem(globals(), "mixed", arithmetic)
    assert abs(play(NashMd(mixture_coef=0.5, tau=TAU)) - plain).max() > 1e-3
