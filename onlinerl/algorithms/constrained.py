"""Constrained: "Confronting Reward Model Overoptimization with Constrained RLHF"; "Safe RLHF: Safe Reinforcement Learning from Human
Feedback"; "MaxMin-RLHF: Equitable Alignment with Diverse Human Preferences"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, field_validator

from onlinerl.algorithms._paid_kl import PaidKl
from onlinerl.algorithms._policy_gradient import PolicyGradient
from onlinerl.ops import multipliers
from onlinerl.ops.advantages import group_advantages
from onlinerl.ops.items import judged_sequences, sample_items, with_advantages, with_sequence
from onlinerl.protocols.algorithm import Algorithm, Reference, by_knobs
from onlinerl.protocols.reported import Reported
from onlinerl.types.plan import Objection

if TYPE_CHECKING:
    from onlinerl.batch import Batch, Outputs
    from onlinerl.loss import LossOutput
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged, Pair
    from onlinerl.types.plan import Plan
    from onlinerl.types.training import TrainItem, TrainSequence, Unit

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
UNREAD = {
    "cost": ("momentum", "max_grad_norm"),
    "maxmin": ("objective", "u0", "u0_std", "kl_clip", "multiplier_lr", "momentum", "max_grad_norm", "window"),
}
"""Knobs that a form has no use for; all others have none for `window`."""


class Constrained(PaidKl):
    """The loss `base` with A made of several scores, each with advantages of its own against the group; Lagrange multipliers say how much each
    counts, and take one step of SGD per iteration: on sigmoid(u) (mean score - threshold) in the bounded form, so that u falls once a score
    is past its threshold.

    `bounded`: A = (C - sum of w) A_0 + sum of w A_c over C constraints, w = sigmoid(u); it ceases to encourage a score, and never pushes back.
    `equality`: the same with w = tanh(u), which does. `linear`: A_0 + sum of u A_c, u of either sign. `cost`: (A_0 - sum of lambda
    A_c) / (1 + sum of lambda) of costs, lambda = exp(u), log lambda += lr lambda (mean cost - limit). `maxmin`: the advantages of
    the score whose mean is lowest above its threshold. The equality form, and how `maxmin` estimates which is lowest, could not be checked.
    Not the paper's: `base`, ppo there; a critic is of one score. Not the paper's: `u0_std`, 0.01 there; with 0 all constraints begin alike.
    """

    form: Literal["bounded", "equality", "linear", "cost", "maxmin"] = "bounded"
    thresholds: dict[Name, float] = Field({"score": 0.0}, min_length=1)
    """The mean beyond which each score is no longer a useful proxy, in its own units; in the cost form the limit of each cost. `score` is
    the oracle's score, the other names are those of `Verdict.components`. The default stands for no value that anybody measured."""
    objective: Name = "kl"
    """What A_0 is made of: `kl`, minus the KL of a response to the reference (k1), `score`, or another name."""
    kl_coef: float = Field(0.0, ge=0)
    """Price of one nat of KL to the reference: in the cost form taken off the objective and added to each cost, else a term of the loss."""
    std_norm: Literal["group", "none"] = "group"
    """Whether the advantages of each score are divided by their standard deviation in the group, so that no score counts more for its units."""
    u0: float = 0.0
    """Where multipliers begin."""
    u0_std: float = Field(0.0, ge=0)
    """Standard deviation of where each begins around `u0`, drawn by its name and `u0_seed`; 0: all of them there."""
    u0_seed: int = Field(0, ge=0)
    """The same draw in every run, unless it is another number."""
    multiplier_lr: float = Field(0.01, ge=0)
    """Learning rate of the multipliers."""
    momentum: float = Field(0.1, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    """Longest gradient of the multipliers together."""
    window: int = Field(1, ge=1)
    """Iterations over which a mean cost is taken."""
    clip_range_low: float | None = Field(None, gt=0)
    clip_range_high: float | None = Field(None, gt=0)
    """Bounds of the ratio; None: those of the base."""
    base: str = Field("grpo", validate_default=True)
    """A loss on the policy's own responses without a critic. What only it has is at its default."""

    @field_validator("base")
    @classmethod
    def _goes_with_the_others(cls, base: str, info: ValidationInfo) -> str:
        if len(info.data) + 1 < len(cls.model_fields):  # another one was refused already
            return base
        form = info.data["form"]
        unread = [n for n in UNREAD.get(form, ("window",)) if info.data[n] != cls.model_fields[n].default]
        if unread:
            raise ValueError(f"with form: {form} nothing would read {', '.join(unread)}; leave it out")
        if "kl" in info.data["thresholds"]:
            raise ValueError("thresholds has kl, which is no score: it is the objective, or has a price (kl_coef)")
        if form == "cost" and (info.data["objective"] == "kl" or info.data["objective"] in info.data["thresholds"]):
            raise ValueError("with form: cost the objective is a reward: set objective to score, or to a name that is no cost")
        if info.data["u0_seed"] and not info.data["u0_std"]:
            raise ValueError("nothing is drawn with u0_seed: u0_std is 0")
        _base(base, _knobs(info.data))
        return base

    @property
    def _names(self) -> tuple[str, ...]:
        """Scores that are read."""
        objective = () if self.form == "maxmin" or self.objective == "kl" else (self.objective,)
        return tuple(dict.fromkeys((*objective, *self.thresholds)))

    @property
    def _reads_kl(self) -> bool:
        return self.kl_coef > 0 if self.form == "cost" else self.form != "maxmin" and self.objective == "kl"

    @by_knobs
    def needs(self) -> Needs:
        """Of a policy gradient, the scores by name, and the reference if a KL is an objective or has a price."""
        return replace(
            super().needs,
            components=tuple(name for name in self._names if name != "score"),
            reference=self.kl_coef > 0 or self.online_kl > 0 or self._reads_kl,
            kl_in_reward=self.form == "cost" and self.kl_coef > 0,
            min_samples=2,
        )

    @by_knobs
    def reference(self) -> Reference:
        """The initial policy."""
        return "fixed" if self.needs.reference else "none"

    @by_knobs
    def unit(self) -> Unit:
        """Of the base."""
        return self._loss.unit

    @by_knobs
    def metrics(self) -> tuple[Reported, ...]:
        """Each constraint's."""
        return tuple(
            metric
            for name in self.thresholds
            for metric in (
                Reported(f"multiplier_{name}", f"Weight of `{name}` in the advantages of the iteration", "1", "iteration"),
                Reported(f"mean_{name}", f"Mean of `{name}` over the training responses", "reward", "iteration"),
            )
        )

    def objection(self, plan: Plan) -> Objection | None:
        """A KL to the policy that has sampled is always 0."""
        always = all(reference == t for t, reference in enumerate(plan.references))
        if not (self._reads_kl and self.form != "cost" and len(plan.references) > 1 and always):
            return None
        cause = "the objective is the KL to the reference, which is always the policy that sampled: it would be 0"
        return Objection(field="reference.schedule", cause=cause, fix="set it to fixed, or algorithm.objective=score")

    def remarks(self, plan: Plan) -> list[str]:
        """How fast multipliers move, and a threshold that nobody chose."""
        said = []
        if self.thresholds == {"score": 0.0}:
            said.append(
                "algorithm.thresholds is {score: 0.0}, which is the default and no value that was measured for this oracle"
            )
        if self.form != "maxmin":
            per_gap = abs(multipliers.slope(self.form, self.u0, 1.0)) * self.multiplier_lr
            said.append(
                f"a multiplier takes one step per iteration: at first by {per_gap:g} where a mean is 1 from its threshold "
                "(algorithm.multiplier_lr)"
            )
        return said

    def items(self, judged: Judged, pairs: Sequence[Pair]) -> tuple[list[TrainItem], Counter[str]]:
        """Each judged response by itself; advantages need log-probs, and multipliers."""
        sequences, dropped = judged_sequences(judged, at_least=2)
        return sample_items(judged, sequences), dropped

    def prepare(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> Iterator[TrainItem]:
        """Advantages of all scores together on every token, f32[T]. Responses of a group that are not trained are no part of its means."""
        weights = self._weights(past, items)
        for _, group in groupby(items, key=lambda item: item.prompt_id):
            members = list(group)
            sequences = [item.sequences[0] for item in members]
            combined = self.combined(sequences, weights)
            for item, sequence in zip(members, with_advantages(sequences, combined), strict=True):
                yield with_sequence(item, sequence)

    def combined(self, sequences: Sequence[TrainSequence], weights: Mapping[str, float]) -> np.ndarray:
        """A[K] of the responses of a group, with these weights of the constraints."""
        kl = np.zeros(len(sequences))
        if self._reads_kl:
            kl = np.array([self.nats(s).sum() for s in sequences])

        def against(values: np.ndarray) -> np.ndarray:
            return group_advantages(values.tolist(), normalise=self.std_norm == "group") if len(values) > 1 else 0.0 * values

        price = self.kl_coef if self.form == "cost" else 0.0
        constrained = sum(w * against(self.clipped(scores(sequences, name)) + price * kl) for name, w in weights.items())
        if self.form == "maxmin":
            return np.asarray(constrained)
        own = against(-kl if self.objective == "kl" else self.clipped(scores(sequences, self.objective)) - price * kl)
        total = sum(weights.values())
        if self.form == "cost":
            return np.asarray((own - constrained) / (1.0 + total))
        return np.asarray((1.0 if self.form == "linear" else len(weights) - total) * own + constrained)

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """The means, which multipliers follow from, and the weights of this iteration."""
        if not items:
            return {}
        weights = self._weights(past, items)
        return {f"mean_{n}": mean for n, mean in self._means(items).items()} | {
            f"multiplier_{n}": w for n, w in weights.items()
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """That of the base; see `surrogate` for what it raises."""
        return self._loss.loss(outputs, batch)

    @property
    def _loss(self) -> PolicyGradient:
        return _base(self.base, _knobs(dict(self)))

    @property
    def _u0(self) -> dict[str, float]:
        """Where each multiplier begins: by its name, so that others beside it change nothing."""
        draws = {name: np.random.default_rng([self.u0_seed, *name.encode()]).standard_normal() for name in self.thresholds}
        return {name: self.u0 + self.u0_std * float(drawn) for name, drawn in draws.items()}

    def _means(self, items: Sequence[TrainItem]) -> dict[str, float]:
        return {name: float(np.mean(scores([item.sequences[0] for item in items], name))) for name in self.thresholds}

    def _weights(self, past: Sequence[Mapping[str, float]], items: Sequence[TrainItem]) -> dict[str, float]:
        """Of the constraints, in this iteration; `past` is what earlier ones have left."""
        if self.form == "maxmin":
            means = self._means(items)
            lowest = min(means, key=lambda name: means[name] - self.thresholds[name])
            return {name: float(name == lowest) for name in means}
        wanted = {f"mean_{name}": name for name in self.thresholds}
        known = [{name: figures[key] for key, name in wanted.items()} for figures in past if wanted.keys() <= figures.keys()]
        sgd = {} if self.form == "cost" else {"momentum": self.momentum, "max_grad_norm": self.max_grad_norm}
        u = multipliers.after(
            self.form, self.thresholds, known, u0=self._u0, rate=self.multiplier_lr, window=self.window, **sgd
        )
        return {name: multipliers.weight(self.form, value) for name, value in u.items()}


def scores(sequences: Sequence[TrainSequence], name: str) -> np.ndarray:
    """One score of each response, f64[K].

    Raises:
        ValueError: if the oracle did not give it.
    """
    if name == "score":
        return np.array([s.score for s in sequences], np.float64)
    if any(name not in s.components for s in sequences):
        raise ValueError(f"`prepare` reads the score {name!r}, which the oracle did not give; declare it in `needs.components`")
    return np.array([s.components[name] for s in sequences], np.float64)


def _knobs(of: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a base is told: None and the usual mode leave it as it is."""
    given = {name: of[name] for name in ("clip_range_low", "clip_range_high") if of[name] is not None}
    if of["importance_sampling_mode"] != "token_truncate":
        given["importance_sampling_mode"] = of["importance_sampling_mode"]
    price = 0.0 if of["form"] == "cost" else of["kl_coef"]
    same = ("importance_sampling_cap", "importance_sampling_floor", "importance_sampling_filter", "online_kl", "nll_coef")
    given |= {name: of[name] for name in (*same, "token_weight_alpha")}
    return tuple((given | {"kl_coef": price}).items())


@cache
def _base(name: str, knobs: tuple[tuple[str, Any], ...]) -> PolicyGradient:
    """The loss of that name, with these knobs.

    Raises:
        ValueError: if it is none that may be wrapped, or takes other knobs.
    """
    from onlinerl import registry

    found = registry.load("algorithms", name, Algorithm, field="algorithm.base")
    if not issubclass(found, PolicyGradient) or issubclass(found, Constrained):
        raise ValueError(f"{name} is no loss on the policy's own responses, such as grpo, dr_grpo, gspo or reinforce_pp")
    try:
        built = found(**dict(knobs))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{name} does not take {'.'.join(map(str, problem['loc']))} as set: {problem['msg']}") from None
    if built.needs.critic is not None or built.needs.pairs or built.unit not in ("token", "sequence"):
        raise ValueError(f"{name} has a critic, which is of one score, or trains pairs; choose one such as grpo")
    if built.needs.kl_in_reward:
        raise ValueError(f"{name} pays the KL inside its reward, which is not read here: set kl_coef=0, or choose another base")
    return built
