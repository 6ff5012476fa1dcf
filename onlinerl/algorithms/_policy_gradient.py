"""What losses on the policy's own responses share: ratios to the one that sampled, and a KL to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.logprobs import lengths, masked, token_log_ratios
from onlinerl.ops.ratios import MAX_LOG_RATIO, Mode, bounded_exp, clipped_surrogate, importance_weights, k3
from onlinerl.protocols.algorithm import Algorithm, Reference, by_knobs
from onlinerl.protocols.needs import Needs

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs

Ratio = Literal["token", "response", "response_mean", "none"]
"""That of a token, of its response, or its geometric mean over it (with the token's gradient); `none`: the log-prob, as in REINFORCE."""
Estimator = Callable[[Tensor], Tensor]


class PolicyGradient(Algorithm):
    """Ratios are between probabilities at the sampling temperature; a KL to the reference may have a price."""

    least: ClassVar[int] = 1
    """Judged responses without which a group teaches nothing."""
    kl_in_reward: ClassVar[bool] = False
    """Whether the KL is paid inside the reward."""

    kl_coef: float = Field(0.0, ge=0)
    """Price of one nat of KL to the reference; 0 needs no reference."""
    online_kl: float = Field(0.0, ge=0)
    """Price of one nat of a KL to the reference that is differentiated through the probability of whole responses: the gradient of the KL itself,
    which those of single tokens are not (see ops/terms.py). A loss that is a mean over tokens divides it by their number, too."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the negative log-prob of tokens with a positive advantage, a mean over tokens or over responses as the loss is, all of them counted:
    "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks"."""
    token_weight_alpha: float = Field(0.0, ge=0, le=1)
    """A token counts 1 - alpha + alpha p in the policy's gradient, p its probability before training: "Do Not Let Low-Probability Tokens
    Over-Dominate in RL for LLMs"."""
    importance_sampling_cap: float | None = Field(2.0, gt=0)
    """Largest weight for having been sampled with other probabilities than the learner gives before training: those of the engine's arithmetic,
    and with `schedule.max_lag: 1` of older weights. None applies no weight."""
    importance_sampling_floor: float | None = Field(None, gt=0, lt=1)
    """Smallest such weight. With `mask` this makes the band of IcePop; public bands are 0.5 to 2 and 0.5 to 5."""
    importance_sampling_mode: Mode = "token_truncate"
    """Whether the ratio of probabilities is that of each token or of the whole response, and whether one outside of floor and cap counts as
    that bound (`truncate`) or not at all (`mask`)."""
    importance_sampling_filter: tuple[float, float] | None = None
    """Lowest and highest geometric mean of the ratios of a response's tokens, e.g. [0.5, 2.0]: one outside teaches the policy nothing, whatever its weights
    are. What it costs in KL stays, and so do the counts that the loss is divided by."""
    p_reset: float = Field(0.0, ge=0, le=1)
    """Share of prompts whose responses begin with a part of the stored answer, cut at random, which is no response token of theirs: "Dataset
    Reset Policy Optimization for RLHF". All responses to a prompt begin with the same tokens, and are judged whole."""

    @by_knobs
    def needs(self) -> Needs:
        """Old log-probs; the reference if the KL has a price."""
        return Needs(
            old_logprobs=True,
            sampling_temperature=True,
            off_policy="refused" if self.importance_sampling_cap is None else "corrected",
            reference=self.kl_coef > 0 or self.online_kl > 0,
            kl_in_reward=self.kl_in_reward and self.kl_coef > 0,
            min_samples=self.least,
            answers=self.p_reset > 0,
            prefix=self.p_reset,
        )

    @by_knobs
    def reference(self) -> Reference:
        """The initial policy, if there is a KL term."""
        return "fixed" if self.kl_coef > 0 or self.online_kl > 0 else "none"

    def with_terms(self, loss: LossOutput, outputs: Outputs, batch: Batch, share: float = 1.0) -> LossOutput:
        """The loss with the price of the KL of whole responses, each of which counts `share`, and the likelihood of better ones."""
        from onlinerl.ops import online_kl, terms  # not with the class: few ask for any

        if self.online_kl:
            loss = online_kl.of_rows(loss, outputs, batch, self.online_kl, self.importance_sampling_cap, share)
        if not self.nll_coef:
            return loss
        better_BT = batch.need("advantages_BT") > 0
        return terms.positive_nll(loss, outputs, batch, self.nll_coef, better_BT, per_token=self.unit == "token")

    def moving(self, logprobs_BT: Tensor, old_BT: Tensor) -> Tensor:
        """The log-probs, through which the gradient flows as `token_weight_alpha` says."""
        from onlinerl.ops import terms

        return terms.reweighed(logprobs_BT, old_BT, self.token_weight_alpha) if self.token_weight_alpha else logprobs_BT

    def correction(self, gap_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        """What each token counts for who sampled it, [B, T] without gradient, and how many are out of bounds. `gap_BT`: log-probs before
        training minus the engine's, 0 where the mask is false."""
        weights_BT, metrics = torch.ones_like(gap_BT), dict[str, Mean]()
        if self.importance_sampling_cap is not None:
            band = self.importance_sampling_floor or 0.0, self.importance_sampling_cap
            weights_BT, below_BT, above_BT = importance_weights(gap_BT, self.importance_sampling_mode, band)
            metrics = {"sampler_floored": Mean.of(below_BT, mask_BT), "sampler_capped": Mean.of(above_BT, mask_BT)}
        if self.importance_sampling_filter is None:
            return weights_BT, metrics
        from onlinerl.ops.terms import near_the_sampler

        near_B = near_the_sampler(gap_BT, mask_BT, self.importance_sampling_filter)
        return weights_BT * near_B[:, None], metrics | {"sampler_filtered": Mean.of(~near_B, mask_BT.any(dim=1))}

    def surrogate(
        self, outputs: Outputs, batch: Batch, bounds: tuple[float, float, float | None], of: Ratio = "token", kl: Estimator = k3
    ) -> tuple[Tensor, dict[str, Mean]]:
        """The clipped loss of each response token, [B, T], zero where the mask is false, and its metrics.

        Ratios outside `bounds` (low, high and dual of `clipped_surrogate`) earn nothing more; they are to the policy that training starts
        from (the proximal one). Each token is weighted by sg[min(exp(old_logprobs - behavior_logprobs), cap)] for not having been sampled
        by it: "Batch size-invariance for policy optimization", with the truncated weight of "Your Efficient RL Framework Secretly Brings
        You Off-Policy RL Training". A KL that no reward pays is added, by the estimator `kl`.

        Raises:
            ValueError: if the batch lacks the old or the engine's log-probs, or advantages.
        """
        mask, (low, high, dual) = batch.sampled_BT, bounds
        logprobs, old = masked(outputs.logprobs_BT, mask), masked(batch.need("old_logprobs_BT"), mask)
        advantages = masked(batch.need("advantages_BT"), mask)
        moving = self.moving(logprobs, old)
        log_ratio = moving - old
        if of.startswith("response"):
            whole = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
            mean = (whole / lengths(batch)[:, None]).detach()
            log_ratio = whole if of == "response" else mean + moving - moving.detach()
        ratio = moving if of == "none" else bounded_exp(log_ratio)
        loss = clipped_surrogate(ratio, advantages, low, high, dual)
        gap = old - masked(batch.need("behavior_logprobs_BT"), mask)
        metrics = {
            "clip_low": Mean.of((ratio < 1.0 - low) & (advantages < 0), mask),
            "clip_high": Mean.of((ratio > 1.0 + high) & (advantages > 0), mask),
            "kl_old": Mean.of(k3(logprobs - old), mask),  # how far the policy moved since training on them began
            # More than a few says that the policy has left the samples: their ratios are no longer what they claim to be.
            "clamped": Mean.of(log_ratio.abs() > MAX_LOG_RATIO, mask),
            # At the sampling temperature. Without lag it is unbiased for the entropy: the tokens were drawn from this policy.
            "entropy_sampled": Mean.of(-old, mask),
            "sampler_gap": Mean.of(gap.abs(), mask),  # how much learner and engine disagree, in nats
            "zero_advantage": Mean.of((advantages == 0).all(dim=1), mask.any(dim=1)),  # rows that teach nothing
            "response_length": Mean.of(batch.sampled_lengths_B, mask.any(dim=1)),
        }
        weights, outside = self.correction(gap, mask)
        loss = loss * weights
        metrics |= outside | {"policy_loss": Mean.of(loss, mask)}
        if outputs.entropy_BT is not None:
            metrics["entropy"] = Mean.of(masked(outputs.entropy_BT, mask), mask)
        loss = masked(loss, mask)
        if self.kl_coef > 0:
            kl_BT = kl(masked(token_log_ratios(outputs, batch), mask))
            metrics["kl_reference"] = Mean.of(kl_BT, mask)
            loss = loss if self.needs.kl_in_reward else loss + self.kl_coef * kl_BT
        return loss, metrics


class Clipped(PolicyGradient):
    """With bounds of the ratio."""

    clip_range_low: float = Field(0.2, gt=0)
    clip_range_high: float = Field(0.2, gt=0)
    """Ratios outside [1 - clip_range_low, 1 + clip_range_high] earn nothing more."""
    dual_clip: float | None = Field(None, gt=1)
    """A token with a negative advantage loses at most this many times it, however large its ratio."""
