"""What the gradients of losses on samples are on average, over all groups that a small policy can give.

Each group is weighted by its probability. They are compared with the exact gradient, by enumeration, of
J = mean reward - price * KL(policy || reference), which is that of whole responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from algorithm_cases import build
from enumerated import Loss, Response, Softmax, Weighted, groups_of, items_of, judged, prepared
from torch import Tensor
from torch.nn.functional import logsigmoid

from onlinerl.algorithms import dr_grpo as dr_grpo_file
from onlinerl.algorithms import ppo as ppo_file
from onlinerl.algorithms import raft as raft_file
from onlinerl.algorithms import reinforce_scalar as reinforce_file
from onlinerl.algorithms import rloo as rloo_file
from onlinerl.algorithms._listwise import Lists
from onlinerl.algorithms.hypo_online_kl import HypoOnlineKl
from onlinerl.algorithms.p3o import P3o
from onlinerl.algorithms.rloo import Rloo
from onlinerl.ops.advantages import group_advantages, leave_one_out
from onlinerl.ops.items import judged_sequences
from onlinerl.ops.ratios import k3
from onlinerl.types import Judged, TrainSequence

PAID = 0.3


class World(NamedTuple):
    """A policy that samples, its reference, and what its responses earn."""

    policy: Softmax
    reference: Softmax
    rewards: Mapping[Response, float]

    def loss(self, name: str, knobs: dict, K: int, *, rewarded: bool = True) -> Tensor:
        """What the algorithm's loss is on average for one group of K responses, as a sum over it; without rewards all scores are 0."""
        algorithm = build(name, knobs)

        def judge(group: tuple[Response, ...]) -> dict:
            return {"scores": [self.rewards[r] if rewarded else 0.0 for r in group]}

        made = items_of(algorithm, groups_of(self.policy.chances(), K, judge))
        return self.of_items(name, knobs, made)

    def of_items(self, name: str, knobs: dict, made: Weighted) -> Tensor:
        """The loss of these items, sampled by the policy."""
        sampled, values = self.policy.table(), self.values()
        tables = {"old_logprobs": sampled, "behavior_logprobs": sampled, "values": values}
        algorithm = build(name, knobs)
        ready = prepared(algorithm, made, reference_logprobs=self.reference.table(), **tables)
        return Loss(algorithm, ready)(sampled, values_BT=values)

    def values(self) -> dict[Response, Tensor]:
        """A critic that knows nothing, but says the same of the same state."""
        drawn = torch.tensor(np.random.default_rng(7).standard_normal(len(self.policy.places)))
        return {r: drawn[[self.policy.places[r[:t]] for t in range(len(r))]] for r in self.policy.responses}

    def kl(self) -> Tensor:
        """KL(policy || reference) of whole responses."""
        theirs = {r: row.sum().detach() for r, row in self.reference.table().items()}
        return self.policy.expected(lambda r, row: row.sum() - theirs[r])

    def objective(self, price: float) -> Tensor:
        """J."""
        return self.policy.expected(lambda r, _: self.rewards[r]) - price * self.kl()

    def token_kl(self, *, forward: bool = False) -> Tensor:
        """The KL of the next token, summed over the states that the policy comes through, as if it could not choose them. `forward`: the
        reference is the one that samples the token."""
        ours, theirs = torch.log_softmax(self.policy.logits, 1), torch.log_softmax(self.reference.logits, 1).detach()
        one, other = (theirs, ours) if forward else (ours, theirs)
        visits = torch.zeros(len(ours), dtype=torch.float64)
        for response, chance in self.policy.chances().items():
            visits[[self.policy.places[response[:t]] for t in range(len(response))]] += chance
        return (visits * (one.exp() * (one - other)).sum(dim=1)).sum()


def world(V: int, T: int) -> World:
    policy = Softmax(V, T, seed=1)
    drawn = np.random.default_rng(3).standard_normal(len(policy.responses))
    return World(policy, Softmax(V, T, seed=2), dict(zip(policy.responses, drawn.tolist(), strict=True)))


WIDE, NARROW, FLAT = world(6, 3), world(3, 3), world(5, 1)
"""156 responses; 15, of which there are 225 groups of two; 5 of one token."""


class Gradient(NamedTuple):
    """What the gradient of a group's loss is on average."""

    name: str
    knobs: dict
    K: int = 2
    share: float | None = 1.0
    """Of minus the gradient of J, for each response of the group; None: it depends on the spread of the advantages."""
    price: float = 0.0
    """Of the KL in J."""


PPO = {"gamma": 1.0, "lam": 1.0, "whiten_advantages": False, "normalize_scores": False, "kl_coef": PAID, "kl_in": "reward"}
GRADIENTS = [
    Gradient("reinforce_scalar", {"baseline": "none"}, K=1),
    Gradient("reinforce_scalar", {"baseline": "none"}),
    Gradient("reinforce_scalar", {"baseline": "loo"}),
    Gradient("reinforce_scalar", {"baseline": "group_mean"}, share=1 / 2),  # it holds the response's own reward
    Gradient("reinforce_scalar", {"baseline": "batch_mean", "adv_norm": "std"}, K=1, share=None),
    Gradient("rloo", {"kl_coef": 0.0}),
    Gradient("rloo", {"kl_coef": PAID}, price=PAID),
    Gradient("p3o", {"kl_coef": 0.0}, share=1 / 2),  # its unit is the pair
    Gradient("p3o", {"kl_coef": PAID}, share=1 / 2, price=PAID),
    Gradient("p3o", {"kl_coef": PAID, "clip_mode": "joint"}, share=1 / 2, price=PAID),
    Gradient("dr_grpo", {"max_length": 7}, share=1 / 2 / 7),
    Gradient("grpo", {"std_norm": "none", "agg": "token_mean"}, share=1 / 2),
    Gradient("ppo", PPO, K=1, price=PAID),  # returns from each token on, whatever the critic says
    Gradient("reinforce_pp", {"kl_coef": PAID}, K=1, share=None, price=PAID),
    Gradient("reinforce_pp_baseline", {"kl_coef": 0.0}, share=None),
]


def check(case: Gradient) -> None:
    where = WIDE if case.K == 1 else NARROW
    got = where.policy.slope(where.loss(case.name, case.knobs, case.K)) / case.K
    exact = -where.policy.slope(where.objective(case.price))
    assert exact.abs().max() > 0.02
    share = case.share if case.share is not None else float((got * exact).sum() / exact.square().sum())
    assert share > 0
    assert got.numpy() == pytest.approx((share * exact).numpy(), abs=1e-6)


def check_all(name: str) -> None:
    for case in GRADIENTS:
        if case.name == name:
            check(case)


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: f"{case.name}-{'-'.join(map(str, case.knobs.values()))}-{case.K}")
def test_the_expected_gradient_is_that_of_the_objective(case):
    check(case)


@pytest.mark.parametrize(
    ("name", "knobs", "share"),
    [("rloo", {"kl_coef": 1.0}, 1.0), ("p3o", {"kl_coef": 1.0}, 1 / 2), ("ppo", PPO | {"kl_coef": 1.0}, 1.0)],
)
def test_a_kl_in_the_reward_has_the_gradient_of_that_of_whole_responses(name, knobs, share):
    got = NARROW.policy.slope(NARROW.loss(name, knobs, 2, rewarded=False)) / 2
    assert got.numpy() == pytest.approx(share * NARROW.policy.slope(NARROW.kl()).numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("reinforce_scalar", {}), ("grpo", {}), ("dr_grpo", {}), ("gspo", {}), ("rloo", {"kl_coef": 0.0})],
)
def test_an_online_kl_has_it_too(name, knobs):
    got = NARROW.policy.slope(NARROW.loss(name, knobs | {"online_kl": 1.0}, 2, rewarded=False)) / 2
    assert got.numpy() == pytest.approx(NARROW.policy.slope(NARROW.kl()).numpy(), abs=1e-6)


IN_THE_LOSS = [
    ("ppo", PPO | {"kl_coef": 1.0, "kl_in": "loss", "lam": 1.0}, False),
    ("reinforce_pp_baseline", {"kl_coef": 1.0}, False),
    ("grpo", {"kl_coef": 1.0, "agg": "token_mean"}, True),
    ("dr_grpo", {"kl_coef": 1.0, "max_length": 1}, True),
]
"""And whether it is k3, whose gradient is that of the forward KL."""


def of_kl_in_the_loss(where: World, name: str, knobs: dict) -> Tensor:
    """Its gradient: with equal scores there is nothing else, so that one group of all responses will do."""
    group = judged(where.policy.responses, scores=(0.0,) * len(where.policy.responses))
    items, _ = build(name, knobs).items(group, [])
    made = Weighted(items, list(where.policy.chances().values()))
    return where.policy.slope(where.of_items(name, knobs, made))


@pytest.mark.parametrize(("name", "knobs", "forward"), IN_THE_LOSS)
def test_a_kl_per_token_in_the_loss_does_not_see_where_tokens_lead(name, knobs, forward):
    """Of one token it is the KL's own gradient, if the estimator is k2."""
    policy = WIDE.policy
    got, exact = of_kl_in_the_loss(WIDE, name, knobs), policy.slope(WIDE.kl())
    assert got.numpy() == pytest.approx(policy.slope(WIDE.token_kl(forward=forward)).numpy(), abs=1e-6)
    assert (got - exact).norm() > 0.2 * exact.norm()
    one, whole = of_kl_in_the_loss(FLAT, name, knobs), FLAT.policy.slope(FLAT.kl())
    assert torch.allclose(one, whole, atol=1e-6) != forward


@pytest.mark.parametrize("K", [2, 3])
def test_raft_learns_the_best_of_k(K):
    """By the logits, its gradient is the policy minus what is imitated; no reward is earned twice, so that has the CDF F^K."""
    got = FLAT.policy.slope(FLAT.loss("raft", {}, K))[0].numpy()
    chances = np.array([FLAT.policy.chances()[r] for r in FLAT.policy.responses])
    order = np.argsort([FLAT.rewards[r] for r in FLAT.policy.responses])
    assert np.cumsum((chances - got)[order]) == pytest.approx(np.cumsum(chances[order]) ** K, abs=1e-6)


def of_bonus(lam: float, K: int) -> Tensor:
    return NARROW.policy.slope(NARROW.loss("hypo_online_kl", {"lam": lam}, K) - NARROW.loss("hypo_online_kl", {"lam": 0.0}, K))


@pytest.mark.parametrize("K", [2, 3])
def test_the_bonus_of_hypo_is_the_gradient_of_the_kl(K):
    """A response counts as often as it is sampled. Only equal ones make no list, but they would add nothing."""
    assert of_bonus(0.7, K).numpy() == pytest.approx(0.7 * NARROW.policy.slope(NARROW.kl()).numpy(), abs=1e-6)


def test_there_is_no_bonus_at_the_reference():
    same = NARROW._replace(reference=NARROW.policy)
    with_it, without = (same.loss("hypo_online_kl", {"lam": lam}, 2) for lam in (0.7, 0.0))
    assert same.policy.slope(with_it - without).abs().max() < 1e-6


def flowing(self: HypoOnlineKl, lists: Lists) -> Tensor:
    """With a gradient through the weights of the KL."""
    ratios = lists.values_GK
    return -logsigmoid(self.beta * (ratios[:, 0] - ratios[:, 1])) + self.lam * 0.5 * (ratios[:, 0] - ratios[:, 1]).square()


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "faulty"),
    [
        ("reinforce_scalar", reinforce_file, "leave_one_out", group_advantages),  # its own reward in the baseline
        ("rloo", Rloo, "prepare", lambda self, items, past=(): items),  # no KL
        ("rloo", rloo_file, "leave_one_out", lambda rewards: -leave_one_out(rewards)),
        ("p3o", P3o, "reward", lambda self, sequence: 2.0 * sequence.score),
        ("dr_grpo", dr_grpo_file, "group_advantages", leave_one_out),
        ("ppo", ppo_file, "gae", lambda rewards, values, **_: (rewards - values, rewards)),  # no reward but the token's own
    ],
)
def test_a_fault_would_be_noticed(monkeypatch, name, owner, attribute, faulty):
    monkeypatch.setattr(owner, attribute, faulty)
    with pytest.raises(AssertionError):
        check_all(name)


def test_a_fault_of_a_kl_would_be_noticed(monkeypatch):
    monkeypatch.setattr(HypoOnlineKl, "list_loss", flowing)
    with pytest.raises(AssertionError):
        test_the_bonus_of_hypo_is_the_gradient_of_the_kl(2)
    monkeypatch.undo()
    monkeypatch.setattr(HypoOnlineKl, "keeps_repeats", False)
    with pytest.raises(AssertionError):
        test_the_bonus_of_hypo_is_the_gradient_of_the_kl(3)
    monkeypatch.setattr(ppo_file, "k3_plus", k3)
    with pytest.raises(AssertionError):
        test_a_kl_per_token_in_the_loss_does_not_see_where_tokens_lead(*IN_THE_LOSS[0])


def test_imitating_the_worst_would_be_noticed(monkeypatch):
    def turned(group: Judged, at_least: int) -> tuple[list[TrainSequence], Counter[str]]:
        sequences, dropped = judged_sequences(group, at_least)
        return [s.with_(score=-s.score) for s in sequences], dropped

    monkeypatch.setattr(raft_file, "judged_sequences", turned)
    with pytest.raises(AssertionError):
        test_raft_learns_the_best_of_k(2)
