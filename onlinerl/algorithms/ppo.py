"""PPO with a critic: "Proximal Policy Optimization Algorithms", as applied to language models in "The N+ Implementation Details of
RLHF with PPO: A Case Study on TL;DR Summarization"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms._paid_kl import PaidKl
from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.critic import clipped_value_loss, gae
from onlinerl.ops.items import judged_sequences, need, sample_items, with_sequence
from onlinerl.ops.logprobs import masked
from onlinerl.ops.ratios import k3_plus
from onlinerl.ops.scaling import adapted_kl, normalized
from onlinerl.ops.whitening import moments, whitening
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.reported import Reported

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.training import TrainItem, TrainSequence


class _Targets(NamedTuple):
    """What a response teaches, f64[T] each."""

    item: TrainItem
    advantages: np.ndarray
    returns: np.ndarray
    values: np.ndarray


def _as_it_is(part: np.ndarray) -> np.ndarray:
    return part


class Ppo(PaidKl):
    """Token mean of: clipped surrogate (equation 7) + vf_coef * value loss - entropy_coef * entropy (equation 9).

    The KL to the reference is a term of the loss (default) or paid per token inside the reward. In the reward it is that of the
    policy which sampled the responses, and does not change while the policy is trained on them: it is 0 as long as that policy is the
    reference (in the first iteration, and always with `reference.schedule: previous`). In the loss it acts at every step.

    Not the paper's: `kl_in`, reward there; iterations are few and large here, and for the whole first one it would be no price at all.
    Not the paper's: `missing_eos_score`, -1 there; what is low depends on the oracle's units, and short limits cut most responses.
    """

    unit = "token"  # policy and value loss are both means over tokens

    kl_coef: float = Field(0.05, ge=0)
    """Price of one nat of KL to the reference; 0 needs no reference. In the reward it is paid in units of the score (see
    `normalize_scores`), in the loss in standard deviations of the advantages."""
    kl_in: Literal["loss", "reward"] = "loss"
    target_kl: float | None = Field(None, gt=0)
    """For `kl_in: reward`: the KL of the rollouts, in nats per sequence, that `kl_coef` is adapted to after every iteration: "Fine-Tuning
    Language Models from Human Preferences", section 2.2. None keeps `kl_coef` as it is."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which the adaptation takes effect; `kl_coef` changes by at most 20 % per so many."""
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda."""
    clip_range: float = Field(0.2, gt=0)
    """Ratios outside 1 +- clip_range earn nothing more."""
    dual_clip: float | None = Field(None, gt=1)
    """A token with a negative advantage loses at most this many times it, however large its ratio."""
    normalize_scores: bool = True
    """Shift and scale scores by mean and standard deviation of all scores so far, so that the critic, which starts at 0, has values of
    about 1 to learn whatever the oracle's units are. "Fine-Tuning Language Models from Human Preferences" does so with its reward model."""
    score_clip: float | None = Field(None, gt=0)
    """A score, as `normalize_scores` leaves it, counts as at most this and at least minus this; 10 in public code."""
    whiten_rewards: bool = False
    """Divide the rewards of all tokens of the iteration by their standard deviation, keeping their mean."""
    missing_eos_score: float | None = None
    """Score of a response that ran into the length limit, instead of the oracle's."""
    whiten_advantages: bool = True
    clip_range_value: float | None = Field(0.2, gt=0)
    """How far a value may move from the old one before it earns nothing more, in units of the (normalized) score. Old values are
    computed once per iteration: with scores that are not normalized it may hold the critic back for many. None sets no limit."""
    vf_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    critic: Literal["separate", "shared"] = "separate"
    """The critic has its own backbone, or is a head on the policy's."""
    critic_model: str | None = None
    """Directory or hub id of a reward model that a separate critic begins with ("The N+ Implementation Details of RLHF with PPO"): one
    label, the policy's family and tokenizer. Its head is taken too if scores are as the oracle gives them (`normalize_scores: false`).
    None: the critic begins as a copy of the policy's backbone."""
    critic_learning_rate: float | None = Field(None, gt=0, le=1)
    """The policy's learning rate if None; ten times that is common, because the critic's head starts at 0."""
    critic_warmup: int = Field(0, ge=0)
    """Iterations at the start in which only the critic learns; it must be separate."""

    metrics = (
        Reported("value_loss", "The critic's loss", "loss"),
        Reported("value", "What the critic expects, mean over tokens", "reward"),
        Reported("return", "What the critic is taught, mean over tokens", "reward"),
        Reported("responses", "Responses trained on", "responses", "iteration"),
        Reported("score_mean", "Mean score of the training responses", "reward", "iteration"),
        Reported("score_std", "Standard deviation of the scores of the training responses", "reward", "iteration"),
        Reported("kl_coef", "Price of one nat of KL to the reference", "1", "iteration"),
        Reported("kl_rollouts", "KL of the rollouts to the reference (k1)", "nats/sequence", "iteration"),
        Reported(
            "explained_variance",
            "1 - Var(return - value) / Var(return) before training; 1 is a perfect critic",
            "1",
            "iteration",
        ),
    )

    @field_validator("target_kl")
    @classmethod
    def _acts(cls, target: float | None, info: ValidationInfo) -> float | None:
        if target is not None and info.data.get("kl_in") != "reward":
            raise ValueError("the price of the KL is adapted only with kl_in: reward")
        if target is not None and not info.data.get("kl_coef"):
            raise ValueError("there is no price to adapt: kl_coef is 0")
        return target

    @field_validator("critic_model", "critic_warmup")
    @classmethod
    def _of_its_own(cls, value: str | int | None, info: ValidationInfo) -> str | int | None:
        if value and info.data.get("critic") == "shared":
            raise ValueError("a shared critic is a head on the policy's own network, which would change with it")
        return value

    @field_validator("critic_model")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        folder = Path(path or "").expanduser()
        return str(folder.absolute()) if path and folder.is_dir() else path  # a resume may start in another working directory

    @by_knobs
    def needs(self) -> Needs:
        """Of a policy gradient; a critic; the entropy if it has a bonus."""
        return replace(
            super().needs,
            critic=self.critic,
            critic_model=self.critic_model,
            critic_head=self.critic_model is not None and not self.normalize_scores,
            critic_learning_rate=self.critic_learning_rate,
            critic_warmup=self.critic_warmup,
            kl_in_reward=self._pays_in_reward,
            entropy=self.entropy_coef > 0,
        )

    @property
    def _pays_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself."""
        sequences, dropped = judged_sequences(judged)
        return sample_items(judged, sequences), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """Advantages f32[T], whitened over all tokens of the iteration, and critic targets f32[T].

        Raises:
            ValueError: if a sequence lacks values or, for the KL in the reward, old or reference log-probs.
        """
        targets = self._targets(items, past)
        # The critic's targets are not whitened.
        sampled = whitening(lambda: (t.advantages[t.item.sequences[0].forced :] for t in targets()))
        scaled = sampled if self.whiten_advantages else _as_it_is
        weight = 0.0 if sum(bool(figures) for figures in past) < self.critic_warmup else 1.0
        for t in targets():
            arrays = {"advantages": scaled(t.advantages).astype(np.float32), "returns": t.returns.astype(np.float32)}
            yield with_sequence(t.item, t.item.sequences[0].with_(**arrays, policy_weight=weight))

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """What later iterations must know: the scores' mean and spread, the KL of the rollouts and its price; and how good the critic is.

        `explained_variance` is 1 - Var(R - V) / Var(R) of the values before training: 1 is a perfect critic, 0 one that says the same
        everywhere. `kl_rollouts` is the mean over responses of sum_t (old_logprobs - reference_logprobs), in nats.
        """
        scores = np.array([self.score(item.sequences[0]) for item in items])
        if not scores.size:
            return {}
        figures = {"responses": float(len(scores)), "score_mean": float(scores.mean()), "score_std": float(scores.std())}
        if self.kl_coef > 0:
            figures["kl_coef"] = self._price(past)
            sequences = (item.sequences[0] for item in items)
            gaps = [(need(s, "old_logprobs") - need(s, "reference_logprobs"))[s.forced :].sum() for s in sequences]
            figures["kl_rollouts"] = float(np.mean(gaps))
        targets = self._targets(items, past)
        _, variance = moments(lambda: (t.returns for t in targets()))
        if variance > 0:
            _, left = moments(lambda: (t.returns - t.values for t in targets()))
            figures["explained_variance"] = float(1.0 - left / variance)
        return figures

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over tokens.

        Raises:
            ValueError: if a field named by `needs` is missing.
        """
        if outputs.values_BT is None:
            raise ValueError("ppo reads outputs.values_BT, which the learner did not compute")
        mask = batch.mask_BT
        loss_BT, metrics = self.surrogate(outputs, batch, (self.clip_range, self.clip_range, self.dual_clip), kl=k3_plus)
        if self.entropy_coef > 0:
            if outputs.entropy_BT is None:
                raise ValueError("an entropy bonus reads outputs.entropy_BT, which the learner did not compute")
            loss_BT = loss_BT - self.entropy_coef * masked(outputs.entropy_BT, batch.sampled_BT)
        values, returns = masked(outputs.values_BT, mask), batch.need("returns_BT")
        value_BT = masked(clipped_value_loss(values, batch.need("values_BT"), returns, self.clip_range_value), mask)
        loss_BT = loss_BT * batch.policy_weight_B[:, None] + self.vf_coef * value_BT
        metrics |= {"value_loss": Mean.of(value_BT, mask), "value": Mean.of(values, mask), "return": Mean.of(returns, mask)}
        loss = LossOutput(total=(loss_BT.sum(dim=1) * batch.weight_B).sum(), metrics=metrics)
        return self.with_terms(loss, outputs, batch)

    def _targets(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]]) -> Callable[[], Iterator[_Targets]]:
        """What each response teaches, one after the other, as often as it is asked for: only scores are kept."""
        scores = np.array([self.score(item.sequences[0]) for item in items])
        if self.normalize_scores:
            scores = normalized(scores, [(f["responses"], f["score_mean"], f["score_std"]) for f in past if "score_std" in f])
        scores, price = self.clipped(scores), self._price(past)

        def rewards() -> Iterator[tuple[TrainItem, np.ndarray]]:
            return ((item, self.rewards(item.sequences[0], score, price)) for item, score in zip(items, scores, strict=True))

        of_sampled = (
            whitening(lambda: (r[i.sequences[0].forced :] for i, r in rewards()), keep_mean=True)
            if self.whiten_rewards
            else None
        )
        scaled = of_sampled or _as_it_is

        def targets() -> Iterator[_Targets]:
            for item, reward in rewards():
                values = need(item.sequences[0], "values")
                advantages, returns = gae(scaled(reward), values, gamma=self.gamma, lam=self.lam)
                yield _Targets(item, advantages, returns, values)

        return targets

    def rewards(self, sequence: TrainSequence, score: float, price: float) -> np.ndarray:
        """r[T]: minus the price of the KL at every token, plus the score at the last one."""
        rewards = np.zeros(len(sequence.response_ids))
        if self._pays_in_reward:
            rewards -= price * self.nats(sequence)
        rewards[-1:] += score  # a slice, because an empty response has no last token
        return rewards

    def score(self, sequence: TrainSequence) -> float:
        """The oracle's, or `missing_eos_score`."""
        cut = sequence.finish_reason == "length" and self.missing_eos_score is not None
        return self.missing_eos_score if cut and self.missing_eos_score is not None else sequence.score

    def _price(self, past: Sequence[Mapping[str, float]]) -> float:
        """`kl_coef`, as adapted by every earlier iteration."""
        if self.target_kl is None:
            return self.kl_coef
        return adapted_kl(
            self.kl_coef,
            [(f["kl_rollouts"], f["responses"]) for f in past if "kl_rollouts" in f],
            target=self.target_kl,
            horizon=self.kl_horizon,
        )
