"""PPO with a critic: "Proximal Policy Optimization Algorithms", as applied to language models in "The N+ Implementation Details of
RLHF with PPO: A Case Study on TL;DR Summarization"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from onlinerl.batch import Batch, LossOutput, Mean, Outputs
from onlinerl.ops.advantages import gae, whiten
from onlinerl.ops.items import judged_sequences, need, sample_items, with_sequence
from onlinerl.ops.kl import k3_plus
from onlinerl.ops.logprobs import masked, token_log_ratios
from onlinerl.ops.surrogate import clipped_value_loss, policy_loss
from onlinerl.protocols import Algorithm, Needs
from onlinerl.types import Judged, Pair, TrainItem, TrainSequence, Unit


class Ppo(Algorithm):
    """Token mean of: clipped surrogate (equation 7) + vf_coef * value loss - entropy_coef * entropy (equation 9).

    The KL to the reference is paid per token, inside the reward (default) or as a term of the loss.
    """

    kl: float = Field(0.05, ge=0)
    """Price of one nat of KL to the reference; 0 needs no reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda."""
    clip: float = Field(0.2, gt=0)
    """Ratios outside 1 +- clip earn nothing more."""
    dual_clip: float | None = Field(None, gt=1)
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the old one before it earns nothing more; in units of the score."""
    vf_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    missing_eos_score: float | None = None
    """Score of a response that ran into the length limit, instead of the oracle's."""
    whiten_advantages: bool = True
    sampler_cap: float | None = Field(2.0, gt=0)
    """Cap of the weight that corrects for engine and learner disagreeing about probabilities; None applies no weight."""
    critic: Literal["separate", "shared"] = "separate"
    """The critic has its own backbone, or is a head on the policy's."""
    critic_learning_rate: float | None = Field(None, gt=0)
    """The policy's learning rate if None."""

    def needs(self) -> Needs:
        """Old log-probs and values; the reference if the KL has a price; the entropy if it has a bonus."""
        return Needs(reference=self.kl > 0, old=True, values=True, entropy=self.entropy_coef > 0)

    @property
    def unit(self) -> Unit:
        """Policy and value loss are both means over tokens."""
        return "token"

    @property
    def default_reference(self) -> Literal["fixed", "previous", "none"]:
        """The initial policy."""
        return "fixed" if self.kl > 0 else "none"

    @property
    def policy_gradient(self) -> bool:
        """Ratios are between probabilities at the sampling temperature."""
        return True

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself."""
        sequences, dropped = judged_sequences(judged)
        return sample_items(judged, sequences), dropped

    def rewards(self, sequence: TrainSequence) -> np.ndarray:
        """r[T]: minus the price of the KL at every token, plus the score at the last one."""
        score = sequence.score
        if sequence.finish_reason == "length" and self.missing_eos_score is not None:
            score = self.missing_eos_score
        rewards = np.zeros(len(sequence.response_ids))
        if self.kl > 0 and self.kl_in == "reward":
            rewards -= self.kl * (need(sequence, "old") - need(sequence, "reference"))
        rewards[-1:] += score  # a slice, because an empty response has no last token
        return rewards

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> list[TrainItem]:
        """Advantages f32[T], whitened over all tokens of the iteration, and critic targets f32[T].

        Raises:
            ValueError: if a sequence lacks values or, for the KL in the reward, old or reference log-probs.
        """
        sequences = [item.sequences[0] for item in items]
        pairs = [gae(self.rewards(s), need(s, "values"), gamma=self.gamma, lam=self.lam) for s in sequences]
        advantages, returns = [a for a, _ in pairs], [r for _, r in pairs]  # the critic's targets are not whitened
        if self.whiten_advantages:
            advantages = whiten(advantages)
        return [
            with_sequence(item, s.with_(advantages=a.astype(np.float32), returns=r.astype(np.float32)))
            for item, s, a, r in zip(items, sequences, advantages, returns, strict=True)
        ]

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens.

        Raises:
            ValueError: if a field named by `needs` is missing.
        """
        if outputs.values_BT is None:
            raise ValueError("ppo reads outputs.values_BT, which the learner did not compute")
        mask = batch.mask_BT
        loss_BT, metrics = policy_loss(
            outputs,
            batch,
            clip_low=self.clip,
            clip_high=self.clip,
            dual_clip=self.dual_clip,
            sampler_cap=self.sampler_cap,
        )
        if self.kl > 0:
            kl_BT = k3_plus(token_log_ratios(outputs, batch))
            metrics["kl_reference"] = Mean.of(kl_BT, mask)
            if self.kl_in == "loss":
                loss_BT = loss_BT + self.kl * kl_BT
        values, returns = masked(outputs.values_BT, mask), batch.need("returns_BT")
        value_BT = masked(clipped_value_loss(values, batch.need("values_BT"), returns, self.value_clip), mask)
        loss_BT = loss_BT + self.vf_coef * value_BT
        if self.entropy_coef > 0:
            if outputs.entropy_BT is None:
                raise ValueError("an entropy bonus reads outputs.entropy_BT, which the learner did not compute")
            loss_BT = loss_BT - self.entropy_coef * masked(outputs.entropy_BT, mask)
        metrics |= {"value_loss": Mean.of(value_BT, mask), "value": Mean.of(values, mask), "return": Mean.of(returns, mask)}
        return LossOutput(total=(loss_BT.sum(dim=1) * batch.weight_B).sum(), metrics=metrics)
