"""Algorithms that are the same where their knobs say so: value and gradient, of the same judged groups.

Through `items` and `prepare`. The golden tests compare most of these losses on pairs made by hand; here what reaches the loss is compared as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from algorithm_cases import build
from enumerated import Loss, Response, Weighted, judged, prepared
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms.dno import Dno
from onlinerl.algorithms.flex_dpo import FlexDpo
from onlinerl.algorithms.gspo import Gspo
from onlinerl.algorithms.list_mle import ListMle
from onlinerl.algorithms.p3o import P3o
from onlinerl.algorithms.rloo import Rloo
from onlinerl.ops.pairs import pair_items
from onlinerl.ops.preference import log_ratios
from onlinerl.types import Judged, Pair

LENGTH = 3
SCORES = (0.3, -1.2, 2.0, 0.9)
DIFFERENT = [tuple(range(10 * k, 10 * k + n)) for k, n in enumerate((4, 2, 1, 3), 1)]
ALIKE = [tuple(range(10 * k, 10 * k + LENGTH)) for k in range(1, 5)]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + np.exp(-x))


def as_judged(group: Judged, pair: Pair) -> float:
    return pair.prob


def certain(group: Judged, pair: Pair) -> float:
    return 1.0


def of_win_rates(group: Judged, pair: Pair) -> float:
    """What dno is trained towards."""
    rates = group.verdict.win_rates()
    return sigmoid(3.0 * (rates[pair.chosen] - rates[pair.rejected]))


class Same(NamedTuple):
    """Two algorithms with their knobs, and where they are the same."""

    one: str
    knobs: dict
    other: str
    others: dict
    prob: Callable[[Judged, Pair], float] = as_judged
    """P(chosen beats rejected) of a pair, for both."""
    responses: list[Response] = DIFFERENT
    zero: bool = False
    """With a reference that gives every response the log-prob 0."""
    group: int = 2
    """Responses of a group."""
    on_policy: bool = False
    """At the policy that sampled, where ratios are 1; then their gradients are the same, and values say nothing."""


SAME = [
    Same("dpo", {}, "osp", {}, certain),
    Same("dpo", {"soft_labels": True}, "osp", {}),
    Same("dpo", {}, "cdpo", {"label_smoothing": 0.0}),
    Same("cdpo", {"label_smoothing": 0.2}, "dpo", {"label_smoothing": 0.2}),
    Same("dpo", {}, "robust_dpo", {"flip_rate": 0.0, "margin_cap": None}),
    Same("dpo", {"beta": 0.3}, "flex_dpo", {"beta": 0.3, "beta_rejected": 0.3}),
    Same("dpo", {}, "dno_prct", {}),
    Same("dpo", {}, "dpo_nll", {"nll_coef": 0.0}),
    Same("dpo", {"beta": 0.3}, "ln_dpo", {"beta": 0.3 * LENGTH}, responses=ALIKE),
    Same("dpo", {"beta": 0.3}, "list_mle", {"beta": 0.3}),
    Same("dpo", {"beta": 0.3}, "aot", {"beta": 0.3}),  # each pair is an optimizer step of its own here
    Same("dpo", {"beta": 0.3}, "aot_unpaired", {"beta": 0.3}),
    Same("dpo", {"beta": 0.3}, "hypo_online_kl", {"beta": 0.3, "lam": 0.0}),
    Same("dpo", {"beta": 0.3}, "cpo", {"beta": 0.3, "nll_coef": 0.0}, zero=True),
    Same("dpo", {"beta": 0.3}, "simpo", {"beta": 0.3 * LENGTH, "gamma_beta_ratio": 0.0}, responses=ALIKE, zero=True),
    Same("dno", {"eta": 0.3, "reward_scale": 3.0}, "osp", {"beta": 0.3}, of_win_rates),
    Same("gspo", {}, "grpo", {}, group=4, on_policy=True),
    Same("gspo", {"kl_coef": 0.1}, "grpo", {"kl_coef": 0.1}, group=4, on_policy=True),
    Same("rloo", {"kl_coef": 0.0}, "reinforce_scalar", {"baseline": "loo"}, group=4, on_policy=True),
    Same("rloo", {"kl_coef": 0.2}, "p3o", {"kl_coef": 0.2}, on_policy=True),
    Same("rloo", {"kl_coef": 0.2}, "p3o", {"kl_coef": 0.2, "clip_mode": "joint", "pairs": "all"}, group=4, on_policy=True),
    Same("dr_grpo", {"max_length": 1}, "reinforce_scalar", {"baseline": "group_mean"}, group=4, on_policy=True),
]


def drawn(responses: list[Response], seed: int) -> dict[Response, Tensor]:
    rng = np.random.default_rng(seed)
    return {response: torch.tensor(-0.1 - 2.0 * rng.random(len(response))) for response in responses}


def mean_loss(name: str, knobs: dict, same: Same) -> tuple[float, np.ndarray]:
    """Mean over groups, each of them an optimizer step, and its gradient by the log-prob of every token of every response."""
    algorithm = build(name, knobs)
    old, reference, now = (drawn(same.responses, seed) for seed in (1, 2, 3))
    policy = {r: row.clone().requires_grad_() for r, row in (old if same.on_policy else now).items()}
    reference = {r: 0.0 * row for r, row in reference.items()} if same.zero else reference
    tables = {"reference_logprobs": reference, "old_logprobs": old, "behavior_logprobs": old}
    losses = []
    for start in range(0, len(same.responses), same.group):
        ours = slice(start, start + same.group)
        group = judged(same.responses[ours], f"p{start}", scores=SCORES[ours])
        best = int(np.argmax(SCORES[ours]))
        pair = Pair(chosen=best, rejected=1 - best, prob=float(group.verdict.matrix()[best, 1 - best]))
        items, _ = algorithm.items(group, [replace(pair, prob=same.prob(group, pair))] if algorithm.needs.pairs else [])
        ready = prepared(algorithm, Weighted(items, [1.0] * len(items)), **tables)
        losses.append(Loss(algorithm, ready)(policy) / sum(item.count(algorithm.unit) for item in ready))
    mean = torch.stack(losses).mean()
    gradient = torch.autograd.grad(mean, list(policy.values()))
    return mean.item(), torch.cat(gradient).numpy()


def turned(group: Judged) -> Judged:
    """The same group with the opposite scores."""
    scores = [-score for score in group.verdict.scores or ()]
    return replace(group, verdict=replace(group.verdict, scores=tuple(scores)))


def check(same: Same) -> None:
    (value, gradient), (others_value, others_gradient) = (
        mean_loss(name, knobs, same) for name, knobs in ((same.one, same.knobs), (same.other, same.others))
    )
    assert np.abs(gradient).max() > 1e-3
    assert gradient == pytest.approx(others_gradient, abs=2e-6)
    if not same.on_policy:
        assert value == pytest.approx(others_value, rel=1e-6)


@pytest.mark.parametrize("same", SAME, ids=lambda same: f"{same.one}-{same.other}")
def test_they_are_the_same(same):
    check(same)


@pytest.mark.parametrize(
    ("one", "other", "owner", "method", "faulty"),
    [
        ("dpo", "flex_dpo", FlexDpo, "phi", lambda self, z: -logsigmoid(1.01 * z)),
        ("dpo", "list_mle", ListMle, "values", lambda self, o, b: -self.beta * log_ratios(o, b)),
        ("dno", "osp", Dno, "items", lambda self, group, pairs: pair_items(turned(group), pairs)),
        ("gspo", "grpo", Gspo, "items", Rloo.items),
        ("rloo", "p3o", P3o, "reward", lambda self, sequence: sequence.score),
    ],
)
def test_a_fault_would_be_noticed(monkeypatch, one, other, owner, method, faulty):
    monkeypatch.setattr(owner, method, faulty)
    with pytest.raises(AssertionError):
        check(next(same for same in SAME if (same.one, same.other) == (one, other)))
