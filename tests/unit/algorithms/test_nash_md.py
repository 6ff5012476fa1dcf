from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, judged, sequence, single

from onlinerl.algorithms.nash_md import NashMd
from onlinerl.batch import Outputs
from onlinerl.ops.batching import collate

VARIANTS = [{}, {"tau": 0.5, "mixture_coef": 0.4, "nll_coef": 0.2}]
KNOBS = {"mixture_coef": [({}, 0.5)], "tau": [({}, 0.5)], "nll_coef": [({}, 0.5)], "mixture_samples": [({}, 2)]}
NAN = float("nan")


def at_reference(items):
    return -np.mean([(item.sequences[0].win_rate - 0.5) * item.sequences[0].behavior_logprobs.sum() for item in items])


def stops_gradients(algorithm):
    """D."""
    return True


# Of two tokens, S = -2 and D = 1; of one token, S = -1 and D = -2.
ITEMS = [
    single(sequence(2, reference_logprobs=-1.5, win_rate=0.9)),
    single(sequence(1, 50, reference_logprobs=1.0, win_rate=0.2)),
]
ROWS = [[-0.5, -1.5], [-1.0]]


def test_value_by_hand():
    # (0.1 * 1 - 0.4) * -2 = 0.6 and (0.1 * -2 + 0.3) * -1 = -0.1
    loss, gradient, _, _ = evaluate(NashMd(tau=0.1), ITEMS, ROWS)
    assert loss == pytest.approx(0.25, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.15, -0.15], abs=1e-6)
    assert gradient[1, 0].item() == pytest.approx(0.05, abs=1e-6)


def test_the_likelihood_of_responses_that_win_is_a_term():
    """Of the first one, 2 nats over two tokens, over two responses."""
    plain, priced = (evaluate(NashMd(nll_coef=c), ITEMS, ROWS) for c in (0.0, 3.0))
    assert priced[0] - plain[0] == pytest.approx(3.0 * 1.0 / 2, abs=1e-6)
    assert (priced[1] - plain[1]).tolist() == [pytest.approx([-0.75, -0.75], abs=1e-6), [0.0, 0.0]]
    assert float(priced[2].metrics["chosen_nll"].total / priced[2].metrics["chosen_nll"].count) == pytest.approx(1.0)


def test_its_gradient_is_that_of_win_rates_and_of_half_a_square_by_finite_differences():
    """tau sg[D] S has the gradient of tau D^2 / 2, as the whole KL has by the score function."""
    torch.manual_seed(0)
    reference, mask = collate(ITEMS).reference_logprobs_BT.double(), collate(ITEMS).mask_BT
    start = torch.where(mask, -torch.rand(mask.shape, dtype=torch.float64), 0.0)
    direction = torch.where(mask, torch.randn(mask.shape, dtype=torch.float64), 0.0)

    def value(logprobs):
        S, D = (torch.where(mask, each, 0.0).sum(dim=1) for each in (logprobs, logprobs - reference))
        return (-(torch.tensor([0.9, 0.2]).double() - 0.5) * S + 0.3 * D.square() / 2).mean().item()

    variable = start.clone().requires_grad_()
    total = NashMd(tau=0.3).loss(Outputs(logprobs_BT=variable), collate(ITEMS)).total / 2
    (gradient,) = torch.autograd.grad(total, variable)
    slope = (value(start + 1e-5 * direction) - value(start - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_an_even_fight_without_a_price_teaches_nothing():
    even = [replace(i, sequences=(i.sequences[0].with_(win_rate=0.5),)) for i in ITEMS]
    loss, gradient, _, _ = evaluate(NashMd(tau=0.0), even, ROWS)
    assert (loss, gradient.abs().max().item()) == (0.0, 0.0)


def test_responses_of_the_policy_fight_those_of_the_mixture_only():
    matrix = ((NAN, 0.9, 0.8, 0.1), (0.1, NAN, 0.4, NAN), (0.2, 0.6, NAN, 0.5), (0.9, NAN, 0.5, NAN))
    group = judged([2, 1, 3, 1], sources={2: "mixture", 3: "mixture"}, preferences=matrix)
    items, dropped = NashMd(mixture_samples=2).items(group, [])
    assert [item.sequences[0].win_rate for item in items] == pytest.approx([0.45, 0.4]), "0.4 of the one that it has met"
    assert [item.sequences[0].source for item in items] == ["policy", "policy"]
    assert dropped == {}
    assert NashMd(mixture_samples=2).most_items(4, 0) == 2


def test_one_that_met_no_opponent_is_left_out():
    matrix = ((NAN, 0.9, 0.8), (0.1, NAN, NAN), (0.2, NAN, NAN))
    items, dropped = NashMd().items(judged([2, 1, 3], sources={2: "mixture"}, preferences=matrix), [])
    assert ([item.sequences[0].win_rate for item in items], dropped) == ([0.8], {"unjudged": 1})
    items, dropped = NashMd().items(judged([2, 1], scores=(1.0, 0.0)), [])
    assert (items, dropped) == ([], {"single": 2})


def test_what_it_asks_for():
    needs = NashMd(mixture_coef=0.25).needs
    assert (needs.mixture_samples, needs.mixture_weight, needs.beside_samples) == (1, 0.25, ("mixture",))
    assert (needs.off_policy, needs.temperature(0.7)) == ("refused", 0.7)
