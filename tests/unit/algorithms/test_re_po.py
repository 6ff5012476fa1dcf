from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from algorithm_batches import ITEM, MARGIN_KNOBS, ROWS, evaluate, pair, sequence

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.re_po import RePo
from onlinerl.errors import ConfigError
from onlinerl.learners._whole_step import first_pass
from onlinerl.ops.batching import annotator_number, collate
from onlinerl.ops.whole_step import Rows
from onlinerl.types import Plan

VARIANTS = [
    {},
    {"base": "ipo", "beta": 1.0, "eta0": 0.7, "nll_coef": 0.3, "pair_weights": "score_gap"},
    {"base": "slic", "loss_form": "reweight", "soft_labels": True},
    {"base": "nbpo", "reference_free": True, "length_norm": True, "gamma_beta_ratio": 0.5},
    {"token_weights": "differing", "nll_coef": 0.3, "nll_target": "reference_answer", "pair_weights": "dcg"},
]
KNOBS = MARGIN_KNOBS | {
    "base": [({}, "ipo"), ({}, "slic"), ({}, "nbpo"), ({}, "exo_pair")],
    "loss_form": [({"base": "ipo"}, "reweight")],
    "eta0": [({}, 0.6)],
    "eta_rate": [],  # these act from the second step on: see below
    "eta_min": [],
    "eta_max": [],
    "warmup_steps": [({}, 5)],
    "flip_rate": [],  # refused
    "pair_weights": [(base, how) for base, how in MARGIN_KNOBS["pair_weights"] if how != "wpo"],  # which is refused
}


def at_reference(items):
    return math.log(2)


def stops_gradients(algorithm):
    """w."""
    return True


A, B = f"eta_{annotator_number('a'):012x}", f"eta_{annotator_number('b'):012x}"


def step(margins, state=None, annotators=None, weights=None) -> Rows:
    """The rows of pairs with these z, all of annotator "a" unless said otherwise."""
    z = torch.as_tensor(margins, dtype=torch.float64)
    numbers = [annotator_number(name) for name in annotators or "a" * len(z)]
    facts = {"prob": torch.ones(len(z)).double(), "annotator": torch.tensor(numbers).double()}
    return Rows(
        values_N=torch.stack([z, torch.zeros_like(z)], dim=1).flatten(),
        facts={name: torch.stack([fact, torch.zeros_like(fact)], dim=1).flatten() for name, fact in facts.items()},
        weight_N=torch.ones(2 * len(z)) if weights is None else torch.tensor(weights).repeat_interleave(2),
        pairs_P2=torch.arange(2 * len(z)).reshape(-1, 2),
        state=state or {},
    )


def test_value_by_hand():
    # z = 0.3, p = sigmoid(0.3) = 0.574443; w = 0.9 p / (0.9 p + 0.1 (1 - p)) = 0.516998 / 0.559554 = 0.923946
    # w f(0.3) + (1 - w) f(-0.3) = 0.923946 * 0.554355 + 0.076054 * 0.854355 = 0.577171
    loss, gradient, _, _ = evaluate(RePo(), [ITEM], ROWS)
    assert loss == pytest.approx(0.577171, abs=1e-6)
    # slope p - w = -0.349503 times beta
    assert gradient[0, 0].item() == pytest.approx(-0.0349503, abs=1e-6)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        # phi(0.3) = (0.3 - 5)^2 = 22.09 and phi(-0.3) = 28.09: p = sigmoid(6) = sigmoid(2 h / tau) = 0.99752738
        # w = 0.89777464 / (0.89777464 + 0.00024726) = 0.99972466; 0.99972466 * 0.00247569 + 0.00027534 * 6.00247569
        ({"base": "ipo"}, 0.0041277),
        # 22.09 + 0.00027534 * 6
        ({"base": "ipo", "loss_form": "reweight"}, 22.0916520),
        # phi = 0.7 and 1.3: p = sigmoid(0.6) = sigmoid(2 z) = 0.64565631, w = 0.58109068 / (0.58109068 + 0.03543437) = 0.94252566
        # 0.94252566 * 0.43748796 + 0.05747434 * 1.03748796
        ({"base": "slic"}, 0.4719726),
        ({"base": "onlinerl.algorithms.slic.Slic"}, 0.4719726),
        # 0.7 + 0.05747434 * 0.6
        ({"base": "slic", "loss_form": "reweight"}, 0.7344846),
    ],
)
def test_other_bases_by_hand(knobs, expected):
    assert evaluate(RePo(**knobs), [ITEM], ROWS)[0] == pytest.approx(expected, abs=2e-7)


def test_both_forms_are_the_same_for_dpo():
    one, other = (evaluate(RePo(loss_form=form), [ITEM], ROWS) for form in ("mixture", "reweight"))
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    assert torch.allclose(one[1], other[1], equal_nan=True)


def test_soft_labels_weaken_both_sides():
    # p = 0.8: l = 0.8 f(0.3) + 0.2 f(-0.3), the flipped one exchanges them; their difference is 0.6 * 0.3 = 0.18
    # p = sigmoid(0.18) = 0.54487889, w = 0.49039100 / (0.49039100 + 0.04551211) = 0.91507401; f(0.18) = 0.60719175
    loss, _, _, _ = evaluate(RePo(soft_labels=True), [ITEM], ROWS)
    assert loss == pytest.approx(0.91507401 * 0.60719175 + 0.08492599 * 0.78719175, abs=1e-6)


def test_an_annotator_who_is_always_right_gives_the_base():
    items = [ITEM, pair(sequence(3, reference_logprobs=-0.5), sequence(2, 50, reference_logprobs=-1.5))]
    rows = (*ROWS, -1.0, -0.25)
    one, other = (evaluate(algorithm, items, rows) for algorithm in (RePo(eta0=1.0), Dpo()))
    assert one[0] == pytest.approx(other[0], rel=1e-7)
    assert torch.allclose(one[1], other[1], equal_nan=True)
    assert RePo(eta0=1.0).next_state(step([-3.0, 2.0])) == {A: 1.0}


def test_a_policy_that_has_no_opinion_leaves_eta_as_it_is():
    """p = 1/2, so w = eta: label smoothing."""
    assert RePo().next_state(step([0.0, 0.0], {A: 0.8}))[A] == pytest.approx(0.8, rel=1e-12)
    assert RePo().step_loss(step([0.0], {A: 0.8})).item() == pytest.approx(math.log(2))


def test_a_step_moves_eta_by_hand():
    # z = log 3 and -log 3: p = 3/4 and 1/4; at eta = 1/2 w = p. Then at z = log 3 alone 0.9 * 0.5 + 0.1 * 0.75
    assert RePo(eta0=0.5).next_state(step([math.log(3), -math.log(3)]))[A] == pytest.approx(0.5)
    assert RePo(eta0=0.5).next_state(step([math.log(3)]))[A] == pytest.approx(0.525)
    assert RePo(eta0=0.5, eta_rate=1.0).next_state(step([math.log(3)]))[A] == pytest.approx(0.75)


def test_a_step_takes_eta_no_further_than_its_bounds():
    bounded = RePo(eta0=0.5, eta_min=0.5, eta_max=0.52)
    assert bounded.next_state(step([math.log(3)])) == {A: 0.52}
    assert bounded.next_state(step([-math.log(3)])) == {A: 0.5}
    assert RePo(eta0=1.0, eta_max=0.99).step_loss(step([0.3])).item() == pytest.approx(math.log1p(math.exp(-0.3)))
    with pytest.raises(ValueError, match="must be above eta_min"):
        RePo(eta_min=0.9, eta_max=0.5)


def test_while_it_warms_up_every_label_counts_as_right_and_eta_is_estimated_all_the_same():
    warming, plain = RePo(warmup_steps=2), RePo()
    rows = step([math.log(3), -math.log(3)])
    assert warming.step_loss(rows).item() == pytest.approx(RePo(eta0=1.0).step_loss(rows).item())
    state, etas = warming.initial_state(), plain.initial_state()
    for done in (1.0, 2.0):
        state, etas = warming.next_state(replace(rows, state=state)), plain.next_state(replace(rows, state=etas))
        assert state == {**etas, "steps": done}
    assert warming.step_loss(replace(rows, state=state)).item() == plain.step_loss(replace(rows, state=etas)).item()
    assert warming.state_metrics(state) == plain.state_metrics(etas)


def test_every_annotator_has_an_eta_from_its_first_pair_on():
    algorithm, z = RePo(eta0=0.5), math.log(3)
    state = algorithm.next_state(step([z, -z, z], annotators="aba"))
    assert state == pytest.approx({A: 0.525, B: 0.475})
    # Whoever is not in a step keeps his: of b w = 1/2 at p = 1 - eta.
    later = algorithm.next_state(step([math.log(0.525 / 0.475)], state, annotators="b"))
    assert later == pytest.approx({A: 0.525, B: 0.9 * 0.475 + 0.1 * 0.5})
    assert algorithm.state_metrics(later) == pytest.approx({"eta": (0.525 + 0.4775) / 2, "eta_lowest": 0.4775})
    assert algorithm.state_metrics({}) == {}


def test_the_loss_reads_the_eta_of_its_own_annotator():
    z = math.log(3)
    rows = step([z, z], {A: 0.9, B: 0.6}, annotators="ab")
    alone = [RePo(eta0=eta).step_loss(step([z])).item() for eta in (0.9, 0.6)]
    assert RePo().step_loss(rows).item() == pytest.approx(sum(alone))
    assert alone[0] < alone[1]


def test_annotators_reach_the_loss_through_the_batch():
    items = [replace(ITEM, annotator="a"), replace(ITEM, annotator="b")]
    batch = collate(items)

    def forward(_):
        from onlinerl.batch import Outputs

        return Outputs(logprobs_BT=torch.zeros(batch.mask_BT.shape))

    algorithm = RePo()
    _, state = first_pass(algorithm, [batch], forward, lambda own: ([own], 0), algorithm.initial_state())
    assert set(state) == {A, B}


def test_pairs_of_weight_zero_say_nothing_about_an_annotator():
    algorithm = RePo(eta0=0.5)
    assert algorithm.next_state(step([math.log(3), -9.0, 1.0], annotators="aab", weights=[1.0, 0.0, 0.0])) == pytest.approx(
        {A: 0.525}
    )


@pytest.mark.parametrize("flips", [[0.25], [0.1, 0.4]])
def test_it_finds_the_share_of_wrong_labels_of_a_policy_that_is_calibrated(flips):
    """25 % flips: eta goes to 0.75."""
    generator = torch.Generator().manual_seed(0)
    algorithm, state = RePo(), {}
    seen: list[dict[str, float]] = []
    for _ in range(150):
        parts, names = [], ""
        for name, flip in zip("ab", flips, strict=False):
            z = 3.0 * torch.randn(500, generator=generator, dtype=torch.float64)
            right = torch.rand(500, generator=generator) < torch.sigmoid(z)
            label = right ^ (torch.rand(500, generator=generator) < flip)
            parts.append(torch.where(label, z, -z))
            names += name * 500
        state = algorithm.next_state(step(torch.cat(parts), state, annotators=names))
        seen.append(dict(state))
    for name, flip in zip((A, B), flips, strict=False):
        assert sum(one[name] for one in seen[-50:]) / 50 == pytest.approx(1 - flip, abs=0.01)


def test_the_value_at_the_reference():
    assert RePo().loss_at_reference == pytest.approx(math.log(2))
    assert RePo(base="ipo", eta0=0.6).loss_at_reference == pytest.approx(math.log(2))
    assert RePo(base="ipo", loss_form="reweight").loss_at_reference == pytest.approx(25.0)
    assert RePo(nll_coef=0.1).loss_at_reference is None
    assert RePo(reference_free=True).loss_at_reference is None


PLAN = Plan(iterations=1, references=(0,), max_lag=0, max_new_tokens=8)


@pytest.mark.parametrize(
    ("knob", "value"), [("flip_rate", 0.2), ("label_smoothing", 0.1), ("soft_labels", True), ("score_margin", 0.5)]
)
def test_what_else_is_assumed_about_labels_is_refused(knob, value):
    found = RePo(**{knob: value, "margin_cap": 10.0}).objection(PLAN)
    assert found is not None
    assert found.field == f"algorithm.{knob}"
    assert found.cause.startswith(f"is {value}, and how far a label is to be trusted is what this algorithm estimates")
    assert found.fix
    assert RePo().objection(PLAN) is None


def test_weights_of_the_moment_are_refused():
    found = RePo(pair_weights="wpo").objection(PLAN)
    assert found is not None
    assert found.field == "algorithm.pair_weights"


@pytest.mark.parametrize(
    ("base", "cause"),
    [
        ("kto", "kto is no loss of the margin of one pair"),
        ("re_po", "re_po is no loss of the margin of one pair"),
        ("irepo", "irepo is no loss of the margin of one pair"),
        ("simpo", "simpo is Dpo with other knobs, and of a base they are not read"),
        ("dpoo", "there is no 'dpoo'"),
    ],
)
def test_a_base_that_is_none_is_refused(base, cause):
    with pytest.raises(ConfigError, match=cause) as caught:
        RePo(base=base)
    assert caught.value.field == "algorithm.base"
    assert caught.value.fix
