"""Losses of the margin between two responses, and what may modify any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from onlinerl.algorithms._labels import UncertainLabels
from onlinerl.algorithms._modified import Modified
from onlinerl.ops.logprobs import lengths, masked, token_log_ratios
from onlinerl.ops.preference import by_pair
from onlinerl.protocols.algorithm import Reference, by_knobs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import Mean
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.training import TrainItem


class Margin(UncertainLabels, Modified):
    """Mean over pairs of p phi(z) + (1 - p) phi(-z), z = beta (D_w - D_l), with the modifiers below in their order, then those of labels.

    D is the log-ratio of policy to reference of a whole response, in nats. A subclass is `phi` and its defaults.
    """

    beta: float = Field(0.1, gt=0)
    """Small lets the policy go far from the reference. With `length_norm` it must grow by about the mean length."""
    reference_free: bool = False
    """Log-probs of the policy in the place of log-ratios."""
    token_weights: Literal["equal", "differing"] = "equal"
    """Whether tokens that both responses have in common count `common_token_weight`, so that the pair is about those in which they differ:
    "IterPref: Focal Preference Learning for Code Generation via Iterative Debugging". The likelihood of `nll_coef` is of all tokens."""
    common_token_weight: float = Field(0.0, ge=0, le=1)
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of the tokens of the longer response beyond the length of the shorter one: "Length Desensitization in Direct Preference
    Optimization". None is 1."""
    length_norm: bool = False
    """Mean instead of sum over tokens: "The Hitchhiker's Guide to Human Alignment with *PO"."""
    beta_rejected: float | None = Field(None, ge=0)
    """Of the rejected response, `beta` then being that of the chosen one: "3D-Properties: Identifying Challenges in DPO and Charting a
    Path Forward". None is `beta`."""
    gamma_beta_ratio: float = 0.0
    """The margin D_w - D_l at which a pair counts as even: "SimPO: Simple Preference Optimization with a Reference-Free Reward"."""
    score_margin: float = Field(0.0, ge=0)
    """Times the gap between the two scores is subtracted from z: "Direct Preference Optimization with an Offset", whose offset is the
    logarithm of the gap."""
    score_margin_max: float | None = Field(None, gt=0)
    """The most that is subtracted, and 0 the least: "Secrets of RLHF in Large Language Models Part II: Reward Modeling"."""
    dpop_lambda: float = Field(0.0, ge=0)
    """Times beta max(0, -D_w) is subtracted from z, so that the chosen response loses no probability: "Smaug: Fixing Failure Modes of
    Preference Optimisation with DPO-Positive"."""
    length_penalty: float = 0.0
    """Times the difference in tokens, chosen minus rejected, is added to z: "Disentangling Length from Quality in Direct Preference
    Optimization"."""

    @field_validator("dpop_lambda")
    @classmethod
    def _has_reference(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("reference_free"):
            raise ValueError("it holds the chosen response at its reference log-prob, and reference_free is set")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of a pair loss; the reference unless it is free of it."""
        return replace(super().needs, reference=not self.reference_free)

    @by_knobs
    def reference(self) -> Reference:
        """The base model, or none."""
        return "none" if self.reference_free else "fixed"

    @by_knobs
    def loss_at_reference(self) -> float | None:
        """phi(0), whatever the label, if nothing but the log-ratios moves z."""
        moved = self.reference_free or self.gamma_beta_ratio or self.score_margin or self.length_penalty
        return None if moved else self.unless_modified(self.phi(torch.zeros(1)).item())

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterable[TrainItem]:
        """With weights of their tokens too."""
        weighed = super().prepare(items, past)
        if self.token_weights == "equal":
            return weighed
        from onlinerl.ops.pair_modifiers import differing

        return (differing(item, self.common_token_weight) for item in weighed)

    def phi(self, z_P: Tensor) -> Tensor:
        """The loss of a pair whose label is right, of its margin z."""
        raise NotImplementedError

    def pair_loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Mean]]:
        """The modified loss."""
        z_P = self.margins(outputs, batch)
        return self.labelled_loss(z_P, self.label_probs(batch)), z_P, {}

    def labelled_loss(self, z_P: Tensor, prob_P: Tensor) -> Tensor:
        """p phi(z) + (1 - p) phi(-z)."""
        return prob_P * self.phi(z_P) + (1.0 - prob_P) * self.phi(-z_P)

    def margins(self, outputs: Outputs, batch: Batch) -> Tensor:
        """z[P]."""
        mask_BT = batch.mask_BT
        values_BT = masked(outputs.logprobs_BT, mask_BT) if self.reference_free else token_log_ratios(outputs, batch)
        if self.token_weights != "equal":
            values_BT = batch.need("token_weights_BT") * values_BT
        if self.ld_alpha is not None:
            from onlinerl.ops.terms import beyond_the_shorter

            values_BT = torch.where(beyond_the_shorter(batch), self.ld_alpha * values_BT, values_BT)
        values_B = values_BT.sum(dim=1)
        chosen, rejected = by_pair(values_B / lengths(batch) if self.length_norm else values_B, batch)
        alike = self.beta_rejected in (None, self.beta)
        z_P = self.beta * (chosen - rejected) if alike else self.beta * chosen - (self.beta_rejected or 0.0) * rejected
        if self.gamma_beta_ratio:
            z_P = z_P - self.beta * self.gamma_beta_ratio
        if self.score_margin:
            better, worse = by_pair(batch.scores_B, batch)
            gap_P, most = self.score_margin * (better - worse), self.score_margin_max
            z_P = z_P - (gap_P if most is None else gap_P.clamp(0.0, most))
        if self.dpop_lambda:
            z_P = z_P - self.beta * self.dpop_lambda * torch.relu(-chosen)
        if self.length_penalty:
            longer, shorter = by_pair(lengths(batch), batch)
            z_P = z_P + self.length_penalty * (longer - shorter)
        return z_P if self.margin_cap is None else z_P.clamp(max=self.margin_cap)
