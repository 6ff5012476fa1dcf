from __future__ import annotations

import math

import pytest
import torch
from algorithm_batches import evaluate, sequence, single
from trl_losses import dpo_loss

from onlinerl.algorithms.bco import Bco
from onlinerl.ops.whole_step import Rows

VARIANTS = [
    {},
    {"threshold": 0.0, "desirable_weight": 1.5, "undesirable_weight": 0.5, "baseline_decay": 0.9, "nll_coef": 0.3},
    {"response_weights": "wpo"},
]
KNOBS = {
    "beta": [({}, 0.3)],
    "desirable_weight": [({}, 2.0)],
    "undesirable_weight": [({}, 2.0)],
    "threshold": [({}, 0.0), ({"threshold": 0.0}, 1.0)],
    "nll_coef": [({}, 0.5)],
    "response_weights": [({}, "wpo")],
    "baseline_decay": [],  # the first step, which the contracts take, has nothing to decay: see below
}


def at_reference(items):
    return math.log(2)


def stops_gradients(algorithm):
    """d."""
    return True


GOOD = single(sequence(4, reference_logprobs=-1.0, win_rate=0.9, score=1.0))
BAD = single(sequence(2, 50, reference_logprobs=-2.0, win_rate=0.1, score=-1.0))


def step(good: list[float], bad: list[float], state: dict[str, float], weights: list[float] | None = None) -> Rows:
    """The rows of a step with these log-ratios."""
    values, labels = torch.tensor([*good, *bad]).double(), torch.tensor([*[1.0] * len(good), *[0.0] * len(bad)])
    weight = torch.ones(len(values)) if weights is None else torch.tensor(weights)
    return Rows(values_N=values, facts={"desirable": labels}, weight_N=weight, pairs_P2=torch.zeros(0, 2).long(), state=state)


def baselines(algorithm: Bco, *steps: tuple[list[float], list[float]]) -> list[float]:
    """d after each of them."""
    state, found = algorithm.initial_state(), []
    for good, bad in steps:
        state = algorithm.next_state(step(good, bad, state))
        found.append(state["baseline"])
    return found


@pytest.mark.parametrize("knobs", [{}, {"threshold": 0.5}, {"baseline_decay": 0.9}])
def test_value_by_hand(knobs):
    # r = 0.2 and -0.1, so d = 0.05: f(0.15) = 0.620957 of either
    loss, gradient, _, _ = evaluate(Bco(**knobs), [GOOD, BAD], [-0.5, -2.5])
    assert loss == pytest.approx(0.620957, abs=1e-6)
    # slopes -beta sigmoid(-0.15) and +beta sigmoid(-0.15), over two responses
    assert gradient[:, 0].tolist() == pytest.approx([-0.1 * 0.462570 / 2, 0.1 * 0.462570 / 2], abs=1e-7)


def test_weights_of_the_classes():
    loss, _, _, _ = evaluate(Bco(desirable_weight=2.0, undesirable_weight=0.5), [GOOD, BAD], [-0.5, -2.5])
    assert loss == pytest.approx(0.620957 * 1.25, abs=1e-6)


def test_the_baseline_balances_the_classes_whatever_their_sizes():
    # means of D 3 and -1: d = 0.1 * (3 - 1) / 2; a mean over all would be 0.1 * 8 / 4
    assert baselines(Bco(), ([3.0, 4.0, 2.0], [-1.0])) == pytest.approx([0.1])


STEPS = ([4.0], [0.0]), ([6.0], [2.0]), ([2.0], [-2.0])
"""Means 2, 4 and 0."""


def test_the_mean_of_all_steps_so_far():
    assert baselines(Bco(beta=1.0), *STEPS) == pytest.approx([2.0, 3.0, 2.0])


def test_the_decaying_mean_begins_with_the_first_step():
    # 0.75 * 2 + 0.25 * 4 = 2.5 and 0.75 * 2.5 + 0.25 * 0 = 1.875
    assert baselines(Bco(beta=1.0, baseline_decay=0.75), *STEPS) == pytest.approx([2.0, 2.5, 1.875])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_step_of_one_class_leaves_the_baseline_as_it_is(decay):
    algorithm = Bco(beta=1.0, baseline_decay=decay)
    state = {"baseline": 0.25, "steps": 3.0}
    assert algorithm.next_state(step([5.0], [], state)) == state
    # f(5 - 0.25) = 0.008615
    assert algorithm.step_loss(step([5.0], [], state)).item() == pytest.approx(0.008615, abs=1e-6)


def test_responses_of_weight_zero_are_not_part_of_the_baseline():
    rows = step([4.0, 100.0], [0.0], {"baseline": 0.0, "steps": 0.0}, weights=[1.0, 0.0, 1.0])
    assert Bco(beta=1.0).next_state(rows)["baseline"] == 2.0


def test_the_loss_takes_the_baseline_after_its_own_step():
    # after two steps of mean 0, one of mean 3: d = 1, so r - d = 4 and d - r = 0 (of D = 5 and 1)
    rows = step([5.0], [1.0], {"baseline": 0.0, "steps": 2.0})
    assert Bco(beta=1.0).step_loss(rows).item() == pytest.approx(0.018150 + math.log(2), abs=1e-6)


def test_with_a_given_d_agrees_with_trl():
    """TRL's loss of this name has d = 0, and takes pairs: with d in the reference and twice the mean over responses it is ours."""
    torch.manual_seed(0)
    lengths, beta = [4, 1, 3, 2, 6, 3], 0.3
    items = [
        single(sequence(n, 10 * i, reference_logprobs=-torch.rand(n), win_rate=0.9 * (i < 3))) for i, n in enumerate(lengths)
    ]
    loss, gradient, _, batch = evaluate(
        Bco(beta=beta), items, rows := [-2 * torch.rand(n, dtype=torch.float64) for n in lengths]
    )
    logprobs, reference = torch.zeros(batch.mask_BT.shape, dtype=torch.float64), batch.reference_logprobs_BT.double()
    for row, tokens in enumerate(rows):
        logprobs[row, : len(tokens)] = tokens
    ratios = ((logprobs - reference) * batch.mask_BT).sum(dim=1)
    reference[:, 0] += (ratios[:3].mean() + ratios[3:].mean()) / 2
    expected = dpo_loss(logprobs.requires_grad_(), reference, batch.mask_BT, beta=beta, bco_pair=1.0) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-7)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logprobs)[0], rtol=1e-6, atol=1e-8)
