"""A reward model that is trained further between the iterations of a run, on what another oracle says of the responses of its policy.

Sources: "Secrets of RLHF in Large Language Models Part II: Reward Modeling" (arXiv 2401.06080), which trains the reward model anew as the policy
moves away from what it knows; "Efficient Online RL Fine-Tuning Need Not Retain Offline Data" (arXiv 2412.07762) for how few old labels suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from onlinerl.errors import ConfigError
from onlinerl.oracles._inner import Inner, OnBase, failed
from onlinerl.preference_models import BRADLEY_TERRY
from onlinerl.protocols.oracle import ModelOracle, Trainable, leaves
from onlinerl.protocols.refreshing import Mode, Refreshing
from onlinerl.types import Failure, Query, Verdict

MODES = {"continue": ("replay", 0.5), "retrain": ("recency", 0.5)}
"""The key that only this mode reads, and its default."""


class Refreshed(OnBase):
    """What `base` says. In each iteration `labels` judges some of the responses too, and every so many iterations `base` is trained on that. Its new
    weights are taken unless they are worse on what is held out; they are another version, whose labels are never mixed with those of the one
    before.
    """

    base: Inner
    """The reward model that judges: {name: reward_model, path: ...}."""
    labels: Inner
    """The oracle that it learns from: a judge, people, verifiers, a larger reward model; never the model itself."""
    every: int = Field(1, ge=1)
    """Iterations between trainings. Those up to the last one count: a run that gets more iterations goes on as if it had had them from the start."""
    prompts: int = Field(32, ge=1)
    """Prompts of each iteration whose responses `labels` judges, drawn by the run's seed."""
    min_new_labels: int = Field(1000, ge=1)
    """Pairs of responses that `labels` must have compared since the last training; where there are fewer the next turn is waited for."""
    mode: Mode = "continue"
    """`continue` trains the weights in use on the new labels and some of the older ones; `retrain` trains those of `base.path` on all labels."""
    replay: float | None = Field(None, ge=0, le=1)
    """Of `continue`: share of the older groups that is trained on once more; 0.5 by default."""
    recency: float | None = Field(None, gt=0, le=1)
    """Of `retrain`: a label counts this to the power of its age in iterations; 0.5 by default."""
    heldout_share: float = Field(0.2, gt=0, lt=1)
    """Share of the prompts, by a hash of the prompt, whose labels are never trained on: the weights before and after are compared on them."""
    batch_size: int = Field(64, ge=1)
    """Comparisons per optimizer step of a training."""
    epochs: int = Field(1, ge=1)
    """Passes over the comparisons. Reward models overfit in the second one."""
    learning_rate: float = Field(5e-6, gt=0, le=1)
    """At its peak; it rises and falls as in `onlinerl train-rm`. The default suits a model of 7B; one of 135M needs 2e-5."""

    _trainable: Trainable | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        base = self.base
        found = base.trainable if isinstance(base, ModelOracle) else None
        if found is None or found.objective != BRADLEY_TERRY:
            raise ConfigError(
                f"{type(base).__name__} has no weights that a training could replace by others",
                field="oracle.base",
                fix="choose oracle.base.name=reward_model, whose model is trained for the objective bradley_terry",
            )
        for section, each in leaves(self.labels, "oracle.labels").items():
            paths = each.paths() if isinstance(each, ModelOracle) else {}
            for key in (key for key, path in paths.items() if Path(path).resolve() == Path(found.path).resolve()):
                raise ConfigError(
                    f"is {found.path}, the model that is to learn from it: its own labels would only make it surer",
                    field=f"{section}.{key}",
                    fix="choose another oracle for oracle.labels, e.g. a judge, people, or a larger reward model",
                )
        for mode, (key, _) in MODES.items():
            if mode != self.mode and getattr(self, key) is not None:
                raise ConfigError(
                    f"belongs to mode={mode}", field=f"oracle.{key}", fix=f"leave it out, or set oracle.mode={mode}"
                )
        self._trainable = found
        return self

    def _of_mode(self, mode: str) -> float:
        """The key that only this mode reads."""
        key, default = MODES[mode]
        value = getattr(self, key)
        return default if value is None else float(value)

    @property
    def refreshing(self) -> Refreshing:
        """As configured."""
        assert self._trainable is not None, "the configuration was checked"
        model: Any = self.base
        return Refreshing(
            model=model,
            labels=self.labels,
            path=self._trainable.path,
            objective=self._trainable.objective,
            max_length=self._trainable.max_length,
            replay=self._of_mode("continue"),
            recency=self._of_mode("retrain"),
            **self.model_dump(include=_AS_THEY_ARE),
        )

    @property
    def version(self) -> str:
        """That of `base`, which is another one after each training: nothing else changes a verdict."""
        return self.base.version

    @property
    def asks_as_needed(self) -> bool:
        """As `base`."""
        return self.base.asks_as_needed

    def requests(self, responses: int) -> int | None:
        """Of `base` alone: what `labels` is asked comes on top (see `oracle_requests.of_refresh`)."""
        return self.base.requests(responses)

    def most_usd(self, prompt_tokens: float, response_tokens: float, responses: int) -> float | None:
        """Of `base` alone, as `requests`."""
        return self.base.most_usd(prompt_tokens, response_tokens, responses)

    def people(self, groups: int, responses: int, *, heldout: bool = False) -> int:
        """Whom `labels` asks, about the drawn prompts of an iteration; nobody is asked about held-out prompts."""
        return 0 if heldout else self.labels.people(min(groups, self.prompts), responses)

    def recorded(self, answers: Sequence[tuple[Query, Verdict | Failure]]) -> None:
        """They are those of `base`; whoever asks `labels` tells it."""
        self.base.recorded(answers)

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """What `base` says."""
        return [failed({"base": said}) or said for said in self._ask("base", queries)]


_AS_THEY_ARE = {"every", "prompts", "min_new_labels", "mode", "heldout_share", "batch_size", "epochs", "learning_rate"}
