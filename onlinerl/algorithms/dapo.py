"""DAPO: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from onlinerl.algorithms.grpo import Grpo
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.reported import Reported
from onlinerl.types.plan import Objection

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.plan import Plan
    from onlinerl.types.training import TrainItem, TrainSequence


class Dapo(Grpo):
    """GRPO without a KL, with more room above a ratio of 1 than below, the mean over all tokens of an optimizer step instead of over each
    response first, dynamic sampling (`sampling.dynamic`), and a score that falls with the length of a response that is nearly too long
    (`overlong_buffer_len`; dynamic sampling looks at scores before).

    Not the paper's: `max_length`, 20480 there; it is a length of the task (`sampling.max_new_tokens`). Not the paper's: `overlong_buffer_len`,
    4096 there; it is counted from `max_length`.

    The printed objective divides by the tokens of one group, the authors' code by those of the step, as here. `training.on_truncated: drop`
    leaves out responses that were cut.
    """

    metrics = (
        Reported("overlong_penalty", "Mean of what responses lose of their score for their length", "reward", "iteration"),
    )

    clip_range_high: float = Field(0.28, gt=0)
    """Ratios outside [1 - clip_range_low, 1 + clip_range_high] earn nothing more."""
    dual_clip: float | None = Field(10.0, gt=1)
    """A token with a negative advantage loses at most this many times it, however large its ratio."""
    agg: Literal["seq_mean_token_mean", "token_mean"] = "token_mean"
    """Mean over the tokens of a response and then over responses, or over all tokens (the authors)."""
    max_length: int | None = Field(None, ge=1)
    """The length at which the whole penalty is due, for `overlong_buffer_len`; in the paper the longest response that is sampled."""
    overlong_buffer_len: int = Field(0, ge=0, validate_default=True)
    """The last so many tokens before `max_length`, over which the penalty grows from 0 to `overlong_penalty_factor`; 0: no penalty."""
    overlong_penalty_factor: float = Field(1.0, gt=0)
    """The largest penalty, in units of the score: 1 belongs to scores of -1 and 1. It grows no further beyond `max_length`."""

    @field_validator("overlong_buffer_len")
    @classmethod
    def _has_an_end(cls, value: int, info: ValidationInfo) -> int:
        end = info.data.get("max_length")
        if (end is None) != (value == 0):
            raise ValueError("it and max_length belong together: set both, or neither")
        if value > (end or 0):
            raise ValueError(f"it is longer than max_length, {end}, so every response would be penalised")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of GRPO, with prompts whose responses differ in their scores."""
        return replace(super().needs, dynamic_sampling=True)

    def objection(self, plan: Plan) -> Objection | None:
        """A penalty that no response can be long enough for."""
        if self.max_length is None or plan.max_new_tokens is None:
            return None
        free = self.max_length - self.overlong_buffer_len
        if plan.max_new_tokens > free:
            return None
        cause = f"only responses of more than {free} tokens are penalised, and sampling.max_new_tokens is {plan.max_new_tokens}"
        return Objection(field="algorithm.max_length", cause=cause, fix=f"set it to {plan.max_new_tokens}")

    def penalty(self, length: int) -> float:
        """What a response of so many tokens loses: "Soft Overlong Punishment"."""
        if self.max_length is None:
            return 0.0
        into = (length - self.max_length + self.overlong_buffer_len) / self.overlong_buffer_len
        return self.overlong_penalty_factor * min(1.0, max(0.0, into))

    def score(self, sequence: TrainSequence) -> float:
        """The oracle's, less the penalty."""
        return sequence.score - self.penalty(len(sequence.response_ids))

    def figures(self, items: Sequence[TrainItem], past: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """The mean penalty, if there is one."""
        lost = [self.penalty(len(item.sequences[0].response_ids)) for item in items]
        return {"overlong_penalty": float(np.mean(lost))} if lost and self.max_length else {}
