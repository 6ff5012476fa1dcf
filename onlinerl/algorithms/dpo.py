"""Online DPO: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" on pairs from the current policy, as in
"Direct Language Model Alignment from Online AI Feedback"."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.logprobs import lengths
from onlinerl.ops.preference import by_pair, logistic, margin, pair_metrics, sequence_logprobs, smoothed
from onlinerl.protocols.algorithm import Needs, Reported, by_knobs


class Dpo(Pairwise):
    """Mean over pairs of p f(z) + (1 - p) f(-z) + nll_coef * NLL(chosen), z = beta (D_w - D_l) (equation 7)."""

    beta: float = Field(0.1, gt=0)
    """Small lets the policy go far from the reference. With `length_norm` it must grow by about the mean length."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels assumed to be wrong: "A Note on DPO with Noisy Preferences & Relationship to IPO"."""
    soft_labels: bool = False
    """Train on the oracle's probability instead of taking every pair's label for certain."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the mean negative log-prob of the chosen tokens: "Iterative Reasoning Preference Optimization", equation 1."""
    length_norm: bool = False
    """Mean instead of sum over tokens: "The Hitchhiker's Guide to Human Alignment with *PO"."""

    metrics = (Reported("chosen_nll", "Negative log-prob of the chosen tokens", "nats/token"),)

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss; probabilities if labels are soft."""
        return super().needs.model_copy(update={"preferences": self.soft_labels})

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """With h = 0 both orientations give ln 2, whatever the label."""
        return None if self.nll_coef > 0 else math.log(2)

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over pairs.

        Raises:
            ValueError: if reference log-probs are missing.
        """
        z_P = self.beta * margin(outputs, batch, length_norm=self.length_norm)
        prob_P = batch.prob_P if self.soft_labels else torch.ones_like(batch.prob_P)
        loss_P = logistic(z_P, smoothed(prob_P, self.label_smoothing))
        metrics = pair_metrics(outputs, batch, z_P) | {"preference_loss": Mean.of(loss_P)}
        if self.nll_coef > 0:
            nll_P, _ = by_pair(-sequence_logprobs(outputs, batch) / lengths(batch), batch)
            loss_P = loss_P + self.nll_coef * nll_P
            metrics["chosen_nll"] = Mean.of(nll_P)
        return LossOutput(total=(loss_P * batch.weight_P).sum(), metrics=metrics)
