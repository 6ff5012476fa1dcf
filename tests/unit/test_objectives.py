"""Objectives of reward and preference models: values by hand, signs and optima. Axes: B rows, D outputs, P pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from onlinerl import registry
from onlinerl.batch import Batch, Outputs
from onlinerl.config.roles import build
from onlinerl.objectives.bradley_terry import BradleyTerry
from onlinerl.objectives.general_preference import GeneralPreference
from onlinerl.objectives.pairwise import Pairwise
from onlinerl.ops.batching import collate
from onlinerl.preference_models import advantages
from onlinerl.types import RawPrompt
from onlinerl.types.preferences import Comparison

PROMPT = RawPrompt(id="p", text="x")


def comparison(**more) -> Comparison:
    return Comparison(prompt=PROMPT, chosen="a", rejected="b", **more)


def batch_of(objective, *comparisons: Comparison) -> Batch:
    return collate([objective.item(each, ([1, 2], [1, 3])) for each in comparisons])


def says(*rows) -> Outputs:
    rewards = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    return Outputs(logprobs_BT=torch.zeros(len(rows), 1), rewards_BD=rewards)


def softplus(z: float) -> float:
    """-log sigmoid(-z)."""
    return math.log1p(math.exp(z))


def loss(objective, outputs: Outputs, *comparisons: Comparison) -> float:
    return objective.loss(outputs, batch_of(objective, *comparisons)).total.item()


SCORES = says([2.0], [0.5], [-1.0], [0.0])
"""z = 1.5 and -1."""
UNCENTERED = {"center_rewards_coefficient": 0.0}


class TestBradleyTerry:
    def test_plain(self):
        wanted = softplus(-1.5) + softplus(1.0)
        assert loss(BradleyTerry(**UNCENTERED), SCORES, comparison(), comparison()) == pytest.approx(wanted, rel=1e-6)
        assert wanted == pytest.approx(0.201413 + 1.313262, abs=1e-6)

    def test_centering(self):
        wanted = softplus(-1.5) + softplus(1.0) + 0.01 * (2.5**2 + 1.0)
        assert loss(BradleyTerry(), SCORES, comparison(), comparison()) == pytest.approx(wanted, rel=1e-6)

    def test_margin(self):
        """A margin above the largest counts as that."""
        objective = BradleyTerry(loss_type="margin", max_margin=2.0, **UNCENTERED)
        wanted = softplus(-(1.5 - 0.5)) + softplus(-(-1.0 - 2.0))
        assert loss(objective, SCORES, comparison(margin=0.5), comparison(margin=9.0)) == pytest.approx(wanted, rel=1e-6)

    def test_scaled(self):
        objective = BradleyTerry(loss_type="scaled", **UNCENTERED)
        wanted = 3 * softplus(-1.5) + softplus(1.0)
        assert loss(objective, SCORES, comparison(strength=3.0), comparison()) == pytest.approx(wanted, rel=1e-6)

    def test_margins_and_strengths_are_not_read_without_being_asked_for(self):
        given = comparison(margin=1.0, strength=3.0)
        assert loss(BradleyTerry(), SCORES, given, given) == loss(BradleyTerry(), SCORES, comparison(), comparison())

    def test_labels_that_are_no_certainty(self):
        wanted = 0.8 * softplus(-1.5) + 0.2 * softplus(1.5)
        assert loss(BradleyTerry(**UNCENTERED), says([2.0], [0.5]), comparison(prob=0.8)) == pytest.approx(wanted, rel=1e-6)
        smooth = BradleyTerry(label_smoothing=0.2, **UNCENTERED)
        assert loss(smooth, says([2.0], [0.5]), comparison()) == pytest.approx(wanted, rel=1e-6)

    def test_the_optimum_of_smoothed_labels(self):
        """z = logit(1 - e), where the slope is 0."""
        z = math.log(0.9 / 0.1)
        outputs = says([z], [0.0])
        objective = BradleyTerry(label_smoothing=0.1, **UNCENTERED)
        objective.loss(outputs, batch_of(objective, comparison())).total.backward()
        torch.testing.assert_close(outputs.rewards_BD.grad, torch.zeros(2, 1), atol=1e-6, rtol=0)

    def test_the_centering_term_leaves_the_best_difference(self):
        """Its slope is the same for both scores."""
        outputs = says([1.0], [0.25])
        without, with_it = BradleyTerry(**UNCENTERED), BradleyTerry(center_rewards_coefficient=0.5)
        slopes = []
        for objective in (without, with_it):
            outputs.rewards_BD.grad = None
            objective.loss(outputs, batch_of(objective, comparison())).total.backward()
            slopes.append(outputs.rewards_BD.grad.flatten().tolist())
        (w0, l0), (w1, l1) = slopes
        assert w1 - w0 == pytest.approx(l1 - l0)
        assert w0 == pytest.approx(-1 / (1 + math.exp(0.75)))
        assert l0 == pytest.approx(-w0), "swapping the two flips the sign of the slope"

    def test_metrics_leave_ties_out(self):
        said = BradleyTerry().loss(SCORES, batch_of(BradleyTerry(), comparison(), comparison(prob=0.5))).metrics
        assert (said["accuracy"].total.item(), said["accuracy"].count.item()) == (1.0, 1.0)
        assert said["margin"].total.item() == pytest.approx(0.5)

    def test_log_odds(self):
        np.testing.assert_allclose(BradleyTerry().log_odds(np.array([[2.0]]), np.array([[0.5]])), [1.5])


class TestGeneralPreference:
    def test_three_unit_vectors_in_a_circle(self):
        """At 0, 120 and 240 degrees each beats the next by sin 120 = 0.866, and all win as often."""
        angles = np.radians([0, 120, 240])
        table = advantages(np.stack([np.cos(angles), np.sin(angles)], axis=1))
        np.testing.assert_allclose(table, -table.T)
        np.testing.assert_allclose([table[0, 1], table[1, 2], table[2, 0]], math.sqrt(3) / 2)
        np.testing.assert_allclose(table.sum(axis=1), 0, atol=1e-12)

    def test_value(self):
        """S = (1 * 0.5 - 2 * 3) + (0.1 * 0.4 - 0.2 * 0.3) = -5.52 in four dimensions."""
        outputs = says([1.0, 2.0, 0.1, 0.2], [3.0, 0.5, 0.3, 0.4])
        for tau in (0.1, 2.0):
            objective = GeneralPreference(dim=4, tau=tau)
            assert loss(objective, outputs, comparison()) == pytest.approx(softplus(5.52 / tau), rel=1e-5)
        margin = GeneralPreference(dim=4, tau=2.0, loss_type="margin")
        assert loss(margin, outputs, comparison(margin=1.0)) == pytest.approx(softplus(6.52 / 2.0), rel=1e-5), "in units of S"

    def test_loss_table_and_log_odds_agree(self):
        rows = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
        objective = GeneralPreference()
        odds = objective.log_odds(rows[[0, 3]], rows[[1, 2]])
        np.testing.assert_allclose(odds, advantages(rows)[[0, 3], [1, 2]] / 0.1, rtol=1e-6)
        outputs = says(*rows[[0, 1, 3, 2]].tolist())
        wanted = [softplus(-z) for z in odds]
        assert loss(objective, outputs, comparison(), comparison()) == pytest.approx(sum(wanted), rel=1e-4)

    def test_one_constant_coordinate_is_bradley_terry(self):
        """With v = (r, 1), S is the difference of scores."""
        two = says([2.0, 1.0], [0.5, 1.0], [-1.0, 1.0], [0.0, 1.0])
        pair = (comparison(), comparison(prob=0.7))
        assert loss(GeneralPreference(dim=2), two, *pair) == pytest.approx(
            loss(BradleyTerry(**UNCENTERED), SCORES, *pair), rel=1e-6
        )

    def test_temperature(self):
        assert GeneralPreference(dim=2).head.description["tau"] == 1.0
        assert GeneralPreference().head.description["tau"] == 0.1
        assert GeneralPreference(tau=0.5).temperature == 0.5
        assert GeneralPreference(dim=8).needs.reward_head[0] == 8

    def test_an_odd_length_is_refused(self):
        with pytest.raises(ValidationError, match="its length is even"):
            GeneralPreference(dim=5)


class TestPairwise:
    def test_value(self):
        """The first order says 1.5 for the chosen response, the second 0.5 for the rejected one."""
        wanted = (softplus(-1.5) + softplus(0.5)) / 2
        assert loss(Pairwise(), says([1.5], [0.5]), comparison()) == pytest.approx(wanted, rel=1e-6)

    def test_a_place_is_worth_nothing(self):
        odds = Pairwise().log_odds(np.array([[1.5 + 7.0]]), np.array([[0.5 + 7.0]]))
        np.testing.assert_allclose(odds, [0.5])


OBJECTIVES = [build({"objective": name}, "reward_model") for name in registry.names("objectives")]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)
class TestEach:
    def test_gradients(self, objective):
        """By finite differences, in float64."""
        outputs = objective.needs.reward_head[0]
        batch = batch_of(objective, comparison(prob=0.8), comparison(weight=2.0))

        def total(rewards):
            return objective.loss(Outputs(logprobs_BT=torch.zeros(4, 1), rewards_BD=rewards), batch).total

        rewards = torch.randn(4, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 3
        assert torch.autograd.gradcheck(total, rewards.requires_grad_(), atol=1e-5)

    def test_the_label_turned_round_is_the_other_loss(self, objective):
        rng = np.random.default_rng(1)
        rows = rng.normal(size=(2, objective.needs.reward_head[0])).tolist()
        turned = says(rows[1], rows[0])
        # Probabilities of a half are those of no label at all.
        assert loss(objective, says(*rows), comparison(prob=0.5)) == pytest.approx(
            loss(objective, turned, comparison(prob=0.5)), rel=1e-5
        )
        assert loss(objective, says(*rows), comparison()) != pytest.approx(loss(objective, turned, comparison()))

    def test_log_odds_change_sign_with_the_order(self, objective):
        rng = np.random.default_rng(2)
        a, b = rng.normal(size=(2, 7, objective.needs.reward_head[0]))
        np.testing.assert_allclose(objective.log_odds(a, b), -objective.log_odds(b, a))

    @pytest.mark.parametrize("loss_type", ["margin", "scaled"])
    def test_what_nobody_gave_cannot_be_read(self, objective, loss_type):
        asked = type(objective)(loss_type=loss_type)
        column = {"margin": "margin", "scaled": "strength"}[loss_type]
        assert f"reads the column {column}, and no comparison has one" in asked.objections([comparison()])
        given = comparison(**{column: 2.0})
        assert asked.objections([given]) is None
        assert "would count twice" in asked.objections([given, comparison(prob=0.7)])
        assert objective.objections([comparison(prob=0.7)]) is None

    def test_a_margin_with_softened_labels_is_refused(self, objective):
        with pytest.raises(ValidationError, match="choose one of loss_type and label_smoothing"):
            type(objective)(loss_type="margin", label_smoothing=0.1)
