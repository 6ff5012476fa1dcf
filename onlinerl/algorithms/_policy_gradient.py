"""What losses on ratios between the policy and the one that sampled share."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.kl import MAX_LOG_RATIO, bounded_exp, k3
from onlinerl.ops.logprobs import masked
from onlinerl.ops.surrogate import clipped_surrogate
from onlinerl.protocols.algorithm import Algorithm, Needs, Reference, by_knobs


class PolicyGradient(Algorithm):
    """Ratios are between probabilities at the sampling temperature; a KL to the reference may have a price."""

    kl: float = Field(0.0, ge=0)
    """Price of one nat of KL to the reference; 0 needs no reference."""
    dual_clip: float | None = Field(None, gt=1)
    """A token with a negative advantage loses at most this many times it, however large its ratio."""
    sampler_cap: float | None = Field(2.0, gt=0)
    """Cap of the weight that corrects for engine and learner disagreeing about probabilities; None applies no weight."""

    @by_knobs
    def needs(self) -> Needs:
        """Old log-probs; the reference if the KL has a price."""
        return Needs(reference=self.kl > 0, old=True, sampling_temperature=True)

    @by_knobs
    def reference(self) -> Reference:
        """The initial policy, if there is a KL term."""
        return "fixed" if self.kl > 0 else "none"

    def surrogate(self, outputs: Outputs, batch: Batch, low: float, high: float) -> tuple[Tensor, dict[str, Mean]]:
        """The clipped loss of each response token, [B, T], zero where the mask is false, and its metrics.

        Ratios outside [1 - low, 1 + high] earn nothing more. Each token is weighted by sg[min(exp(old - behaviour), sampler_cap)],
        because the engine's probabilities differ from the learner's for the same weights: "Your Efficient RL Framework Secretly
        Brings You Off-Policy RL Training".

        Raises:
            ValueError: if the batch lacks the old or the engine's log-probs, or advantages.
        """
        mask = batch.mask_BT
        logprobs, old = masked(outputs.logprobs_BT, mask), masked(batch.need("old_BT"), mask)
        advantages = masked(batch.need("advantages_BT"), mask)
        ratio = bounded_exp(logprobs - old)
        loss = clipped_surrogate(ratio, advantages, low, high, self.dual_clip)
        gap = old - masked(batch.need("behaviour_BT"), mask)
        metrics = {
            "clip_low": Mean.of((ratio < 1.0 - low) & (advantages < 0), mask),
            "clip_high": Mean.of((ratio > 1.0 + high) & (advantages > 0), mask),
            "kl_old": Mean.of(k3(logprobs - old), mask),  # how far the policy moved since the rollouts
            # More than a few says that the policy has left the samples: their ratios are no longer what they claim to be.
            "clamped": Mean.of((logprobs - old).abs() > MAX_LOG_RATIO, mask),
            # Unbiased for the entropy of the policy that sampled, at the sampling temperature: the tokens were drawn from it.
            "entropy_sampled": Mean.of(-old, mask),
            "sampler_gap": Mean.of(gap.abs(), mask),  # how much learner and engine disagree, in nats
            "zero_advantage": Mean.of((advantages == 0).all(dim=1), mask.any(dim=1)),  # rows that teach nothing
            "response_length": Mean.of(batch.lengths_B, mask.any(dim=1)),
        }
        if self.sampler_cap is not None:
            loss = loss * bounded_exp(gap).clamp(max=self.sampler_cap).detach()
            metrics["sampler_capped"] = Mean.of(gap > math.log(self.sampler_cap), mask)
        metrics["policy_loss"] = Mean.of(loss, mask)
        if outputs.entropy_BT is not None:
            metrics["entropy"] = Mean.of(masked(outputs.entropy_BT, mask), mask)
        return masked(loss, mask), metrics
