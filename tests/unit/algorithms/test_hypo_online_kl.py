from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from algorithm_batches import ITEM, LIST, LIST_KNOBS, LIST_ROWS, ROWS, evaluate

from onlinerl.algorithms._listwise import Lists
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.hypo_online_kl import HypoOnlineKl

VARIANTS = [{}, {"lam": 0.1, "beta": 0.5}]
KNOBS = {"beta": [({}, 0.3)], "lam": [({}, 0.5)]} | LIST_KNOBS


def at_reference(items):
    return math.log(2)


def stops_gradients(algorithm):
    """Weights of the samples of its KL."""
    return True


@pytest.mark.parametrize(("lam", "expected"), [(0.0, 0.656350), (0.1, 0.656350 + 0.1 * 2.25)])
def test_value_by_hand(lam, expected):
    """D = (2, -1, 0.5), best first: f(0.05 * 1.5); the means of the others are -0.25, 1.25 and 0.5: (2.25 * 2 + 2.25 * 1 + 0) / 3."""
    assert evaluate(HypoOnlineKl(lam=lam), [LIST], LIST_ROWS)[0] == pytest.approx(expected, abs=1e-6)


def test_of_two_responses_and_without_the_kl_it_is_dpo():
    one, other = evaluate(HypoOnlineKl(beta=0.1, lam=0.0), [ITEM], ROWS), evaluate(Dpo(beta=0.1), [ITEM], ROWS)
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    assert torch.allclose(one[1], other[1], atol=1e-12)


def test_on_average_over_the_policys_own_samples_the_gradient_is_that_of_the_kl():
    """Exactly, for all groups of three that a policy over three responses can give."""
    logits = torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs, reference = torch.log_softmax(logits, 0), torch.log_softmax(torch.tensor([-0.5, 0.2, 0.4]).double(), 0)
    ratios = logprobs - reference
    (exact,) = torch.autograd.grad((logprobs.exp() * ratios).sum(), logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for group in product(range(3), repeat=3):
        chosen = list(group)
        valid = torch.ones(1, 3, dtype=torch.bool)
        lists = Lists(values_GK=ratios[chosen][None], labels_GK=valid.double(), lengths_GK=valid.double(), valid_GK=valid)
        (loss,) = HypoOnlineKl(lam=1.0).list_loss(lists) - HypoOnlineKl(lam=0.0).list_loss(lists)
        estimate += logprobs[chosen].sum().exp().detach() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.allclose(estimate, exact, atol=1e-12)
