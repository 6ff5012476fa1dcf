"""What losses on ratios between the policy and the one that sampled share."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from onlinerl.batch import Batch, Mean, Outputs
from onlinerl.ops.surrogate import policy_loss
from onlinerl.protocols.algorithm import Algorithm, Needs, Reference, by_knobs


class PolicyGradient(Algorithm):
    """Ratios are between probabilities at the sampling temperature; a KL to the reference may have a price."""

    kl: float = Field(0.0, ge=0)
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
        """The clipped loss of each response token, [B, T], and its metrics; ratios outside [1 - low, 1 + high] earn nothing more."""
        return policy_loss(outputs, batch, clip_low=low, clip_high=high, dual_clip=self.dual_clip, sampler_cap=self.sampler_cap)
