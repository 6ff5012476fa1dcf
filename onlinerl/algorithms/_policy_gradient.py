"""What losses on ratios between the policy and the one that sampled share."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.importance import Mode, importance_weights
from onlinerl.ops.kl import MAX_LOG_RATIO, bounded_exp, k3
from onlinerl.ops.logprobs import masked
from onlinerl.ops.surrogate import clipped_surrogate
from onlinerl.protocols.algorithm import Algorithm, Needs, OffPolicy, Reference, by_knobs


class PolicyGradient(Algorithm):
    """Ratios are between probabilities at the sampling temperature; a KL to the reference may have a price."""

    kl_coef: float = Field(0.0, ge=0)
    """Price of one nat of KL to the reference; 0 needs no reference."""
    dual_clip: float | None = Field(None, gt=1)
    """A token with a negative advantage loses at most this many times it, however large its ratio."""
    importance_sampling_cap: float | None = Field(2.0, gt=0)
    """Largest weight that corrects for a response being sampled with other probabilities than those that the learner gives it before
    training: those of the engine's arithmetic, and with `schedule.max_lag: 1` of older weights. None applies no weight."""
    importance_sampling_mode: Mode = "token_truncate"
    """Whether the ratio of probabilities is that of each token or of the whole response, and whether one above the cap counts as the cap
    (`truncate`) or not at all (`mask`)."""

    @field_validator("importance_sampling_mode")
    @classmethod
    def _is_read(cls, mode: Mode, info: ValidationInfo) -> Mode:
        if mode != "token_truncate" and info.data.get("importance_sampling_cap", 0) is None:
            raise ValueError("importance_sampling_cap is null, so there is no weight")
        return mode

    @by_knobs
    def needs(self) -> Needs:
        """Old log-probs; the reference if the KL has a price."""
        uncorrected = self.importance_sampling_cap is None
        off_policy: OffPolicy = "refused" if uncorrected else "corrected"
        return Needs(reference=self.kl_coef > 0, old_logprobs=True, sampling_temperature=True, off_policy=off_policy)

    @by_knobs
    def reference(self) -> Reference:
        """The initial policy, if there is a KL term."""
        return "fixed" if self.kl_coef > 0 else "none"

    def surrogate(self, outputs: Outputs, batch: Batch, low: float, high: float) -> tuple[Tensor, dict[str, Mean]]:
        """The clipped loss of each response token, [B, T], zero where the mask is false, and its metrics.

        Ratios outside [1 - low, 1 + high] earn nothing more; they are taken to the policy that training starts from (the proximal one),
        and each token is weighted by sg[min(exp(old_logprobs - behavior_logprobs), cap)] for not having been sampled by it: "Batch
        size-invariance for policy optimization", with the truncated weight of "Your Efficient RL Framework Secretly Brings You
        Off-Policy RL Training".

        Raises:
            ValueError: if the batch lacks the old or the engine's log-probs, or advantages.
        """
        mask = batch.mask_BT
        logprobs, old = masked(outputs.logprobs_BT, mask), masked(batch.need("old_logprobs_BT"), mask)
        advantages = masked(batch.need("advantages_BT"), mask)
        ratio = bounded_exp(logprobs - old)
        loss = clipped_surrogate(ratio, advantages, low, high, self.dual_clip)
        gap = old - masked(batch.need("behavior_logprobs_BT"), mask)
        metrics = {
            "clip_low": Mean.of((ratio < 1.0 - low) & (advantages < 0), mask),
            "clip_high": Mean.of((ratio > 1.0 + high) & (advantages > 0), mask),
            "kl_old": Mean.of(k3(logprobs - old), mask),  # how far the policy moved since training on them began
            # More than a few says that the policy has left the samples: their ratios are no longer what they claim to be.
            "clamped": Mean.of((logprobs - old).abs() > MAX_LOG_RATIO, mask),
            # At the sampling temperature. Without lag it is unbiased for the entropy: the tokens were drawn from this policy.
            "entropy_sampled": Mean.of(-old, mask),
            "sampler_gap": Mean.of(gap.abs(), mask),  # how much learner and engine disagree, in nats
            "zero_advantage": Mean.of((advantages == 0).all(dim=1), mask.any(dim=1)),  # rows that teach nothing
            "response_length": Mean.of(batch.lengths_B, mask.any(dim=1)),
        }
        if self.importance_sampling_cap is not None:
            weights, above = importance_weights(gap, self.importance_sampling_mode, self.importance_sampling_cap)
            loss = loss * weights
            metrics["sampler_capped"] = Mean.of(above, mask)
        metrics["policy_loss"] = Mean.of(loss, mask)
        if outputs.entropy_BT is not None:
            metrics["entropy"] = Mean.of(masked(outputs.entropy_BT, mask), mask)
        return masked(loss, mask), metrics
