"""RE-PO: "RE-PO: Robust Enhanced Policy Optimization as a General Framework for LLM Alignment"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from onlinerl.algorithms._base import base_loss
from onlinerl.algorithms._margin import Margin
from onlinerl.ops.margins import logistic
from onlinerl.ops.preference import by_pair, pair_metrics
from onlinerl.ops.whole_step import Rows, State, WholeStep
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.reported import Reported
from onlinerl.types.plan import Objection, Plan

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import LossOutput, Mean

STEPS = "steps"


class RePo(WholeStep, Margin):
    """Mean over pairs of -w log p - (1 - w) log(1 - p): expectation maximization over whether each label is right.

    p = sigmoid(l of the flipped label - l of the label) is what the policy says of it, l being the loss `base`; w = eta p / (eta p +
    (1 - eta)(1 - p)), without gradient, is the probability that the label is right. After each step the eta of every annotator moves
    towards the mean w of its pairs. The policy must already say something about right and wrong, or w follows its mistakes.
    At first it was called LCPO: "Latent Collective Preference Optimization: A General Framework for Robust LLM Alignment".
    """

    base: str = "dpo"
    """l: a loss of the margin. What only it has (`tau` of `ipo`) is at its default; `beta` and what may modify any of them are set here."""
    loss_form: Literal["mixture", "reweight"] = "mixture"
    """`mixture` is the formula above; `reweight` is w l + (1 - w) l of the flipped label, the same for `dpo` only. Which of the two the
    authors' code has could not be checked."""
    eta0: float = Field(0.9, gt=0, le=1)
    """Share of an annotator's labels that are right, as first assumed; the paper's win rates are lower with 0.99 and with 0.55."""
    eta_rate: float = Field(0.1, ge=0, le=1)
    """Share of a step in the next eta; the paper's win rates are lower with 0.001 and with 1."""
    eta_min: float = Field(0.0, ge=0, lt=1)
    """A step takes no eta below this; 0.5 says that no annotator is worse than chance."""
    eta_max: float = Field(1.0, gt=0, le=1)
    """Nor above this; 0.99 keeps a label doubtful whatever the policy thinks."""
    warmup_steps: int = Field(0, ge=0)
    """For so many steps every label counts as right in the loss, while eta is estimated: a policy that knows nothing yet confirms itself."""

    metrics = (
        Reported("eta", "Estimated share of right labels, mean over annotators", "ratio"),
        Reported("eta_lowest", "The same of the annotator with the lowest", "ratio"),
    )

    @field_validator("eta_max")
    @classmethod
    def _is_above(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("eta_min", 0.0):
            raise ValueError(f"it must be above eta_min, {info.data['eta_min']:g}")
        return value

    @field_validator("base")
    @classmethod
    def _is_a_loss(cls, value: str) -> str:
        base_loss(value)
        return value

    def objection(self, plan: Plan) -> Objection | None:
        """What else is assumed about wrong labels, beside the share that is estimated; weights that a whole step does not read."""
        if self.pair_weights == "wpo":
            cause = "is wpo, whose weights are those of the moment, and this loss is made of a whole step before it"
            return Objection(field="algorithm.pair_weights", cause=cause, fix="choose equal, score_gap or certainty")
        read = ("flip_rate", "label_smoothing", "soft_labels", "score_margin")
        assumed = {knob: getattr(self, knob) for knob in read}
        twice = next((knob for knob, value in assumed.items() if value), None)
        if twice is None:
            return super().objection(plan)
        cause = f"is {assumed[twice]}, and how far a label is to be trusted is what this algorithm estimates: it would be counted twice"
        return Objection(
            field=f"algorithm.{twice}", cause=cause, fix="leave it out; algorithm.eta0 is what the estimate begins with"
        )

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """There p = 1/2: log 2 of a mixture, whatever eta and base, and phi(0) of a reweighted loss."""
        plain = super().loss_at_reference
        return plain if plain is None or self.loss_form == "reweight" else math.log(2)

    def phi(self, z_P: Tensor) -> Tensor:
        """That of the base."""
        return base_loss(self.base).phi(z_P)

    def values(self, outputs: Outputs, batch: Batch) -> Tensor:
        """z of each pair, at its chosen response."""
        return _at_chosen(self.margins(outputs, batch), batch)

    def facts(self, batch: Batch) -> Mapping[str, Tensor]:
        """How far labels are trusted, and whose they are, at chosen responses."""
        whose_P = batch.need("annotators_G").double()
        return {"prob": _at_chosen(self.label_probs(batch), batch), "annotator": _at_chosen(whose_P, batch)}

    def step_loss(self, rows: Rows) -> Tensor:
        """Of all pairs of the step."""
        label_P, flipped_P, w_P = self._both(rows)
        if self.warmup_steps and rows.state.get(STEPS, 0.0) < self.warmup_steps:
            w_P = torch.ones_like(w_P)
        mixture = self.loss_form == "mixture"
        loss_P = logistic(flipped_P - label_P, w_P) if mixture else w_P * label_P + (1.0 - w_P) * flipped_P
        return (loss_P * rows.weight_N[rows.pairs_P2[:, 0]]).sum()

    def initial_state(self) -> State:
        """eta by annotator, from the first step on that has a pair of it."""
        return {}

    def next_state(self, rows: Rows) -> State:
        """Every eta whose annotator has a pair in this step, a step on; pairs of weight 0 are none."""
        found: dict[str, list[float]] = {}
        weights_P, (_, _, w_P) = rows.weight_N[rows.pairs_P2[:, 0]], self._both(rows)
        for name, weight, w in zip(_annotators(rows), weights_P.tolist(), w_P.tolist(), strict=True):
            if weight > 0:
                found.setdefault(name, []).append(w)
        old, rate = {name: rows.state.get(name, self.eta0) for name in found}, self.eta_rate
        new = {name: (1.0 - rate) * old[name] + rate * fmean(found[name]) for name in found}
        bounded = {name: min(max(eta, self.eta_min), self.eta_max) for name, eta in new.items()}
        return {**rows.state, **bounded, **({STEPS: rows.state.get(STEPS, 0.0) + 1.0} if self.warmup_steps else {})}

    def state_metrics(self, state: State) -> State:
        """Over annotators."""
        etas = [eta for name, eta in state.items() if name != STEPS]
        return {"eta": fmean(etas), "eta_lowest": min(etas)} if etas else {}

    def step_metrics(self, outputs: Outputs, batch: Batch, values_B: Tensor) -> dict[str, Mean]:
        """As of any loss on pairs."""
        return pair_metrics(outputs, batch, by_pair(values_B, batch)[0], reference=self.needs.reference)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """With the likelihood of chosen responses.

        Raises:
            ValueError: if reference log-probs are needed and missing.
        """
        return self.with_terms(super().loss(outputs, batch), outputs, batch)

    def _both(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """l of each label, l of the flipped one, and w, [P] each; the last without gradient."""
        chosen = rows.pairs_P2[:, 0]
        z_P, prob_P = rows.values_N[chosen], rows.facts["prob"][chosen]
        label_P, flipped_P = self.labelled_loss(z_P, prob_P), self.labelled_loss(z_P, 1.0 - prob_P)
        eta_P = z_P.new_tensor([rows.state.get(name, self.eta0) for name in _annotators(rows)])
        return label_P, flipped_P, torch.sigmoid(torch.logit(eta_P) + (flipped_P - label_P).detach())


def _annotators(rows: Rows) -> list[str]:
    """Whose eta is that of each pair: names in the state."""
    return [f"eta_{int(number):012x}" for number in rows.facts["annotator"][rows.pairs_P2[:, 0]].tolist()]


def _at_chosen(values_P: Tensor, batch: Batch) -> Tensor:
    """A value per pair -> the same at its chosen response, [B]; 0 at the others."""
    return values_P.new_zeros(len(batch.weight_B)).index_copy(0, batch.pairs_P2[:, 0], values_P)
