"""What objectives share: how strongly a comparison speaks, and the likelihood of its label. Axis in comments: P pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from onlinerl.batch import Batch, Outputs
from onlinerl.loss import LossOutput, Mean
from onlinerl.ops.margins import logistic
from onlinerl.ops.preference import by_pair, smoothed
from onlinerl.preference_models import RewardHead, single
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.protocols.needs import Needs
from onlinerl.protocols.objective import Objective
from onlinerl.protocols.reported import Reported
from onlinerl.types.preferences import Comparison
from onlinerl.types.prompts import RawPrompt
from onlinerl.types.training import TrainItem, TrainSequence


class Comparisons(Objective):
    """Mean over comparisons of strength * -log sigmoid(z - margin), z the log-odds that the chosen response wins.

    "HelpSteer2-Preference: Complementing Ratings with Preferences" (arXiv 2410.01257), equations 1 to 3. Labels that are no certainty
    (`prob`) count as -p log sigmoid(z) - (1 - p) log sigmoid(-z), whose optimum is z = logit(p).
    """

    metrics = (
        Reported("accuracy", "Share of comparisons of the step in which the chosen response has the better odds", "ratio"),
        Reported("margin", "Log-odds that the chosen response wins, mean over the step", "nats"),
    )

    loss_type: Literal["plain", "margin", "scaled"] = "plain"
    """What is made of how much better the chosen response is: nothing, a margin that z must exceed (column `margin`), or a factor of the
    loss (column `strength`)."""
    max_margin: float = Field(3.0, gt=0)
    """A larger margin counts as this one."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """How often labels are wrong: they count as right with the probability 1 - label_smoothing."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Comparisons:
        if self.loss_type == "margin" and self.label_smoothing:
            raise ValueError(
                "a margin and softened labels pull z to different places: choose one of loss_type and label_smoothing"
            )
        return self

    @property
    def head(self) -> RewardHead:
        """What is read at the last token, and what the model's configuration says of it."""
        raise NotImplementedError

    @by_knobs
    def needs(self) -> Needs:
        """A head instead of a policy."""
        return Needs(reward_head=self.head)

    def encode(self, tokenizer: Any, prompt: RawPrompt, first: str, second: str, model: str) -> tuple[list[int], list[int]]:
        """The prompt with each of the two responses."""
        return single(tokenizer, prompt, first, model), single(tokenizer, prompt, second, model)

    def item(self, comparison: Comparison, tokens: Sequence[Sequence[int]]) -> TrainItem:
        """With the margin, as the gap between two scores, or the factor, if either is read."""
        factor = comparison.strength if self.loss_type == "scaled" else 1.0
        margin = min(comparison.margin, self.max_margin) if self.loss_type == "margin" else 0.0
        scored = zip(tokens, (margin, 0.0), strict=True)
        return TrainItem(
            prompt_id=comparison.prompt.id,
            sequences=tuple(TrainSequence(prompt_ids=tuple(ids), response_ids=(), score=score) for ids, score in scored),
            prob=comparison.prob,
            weight=comparison.weight * factor,
        )

    def objections(self, comparisons: Sequence[Comparison]) -> str | None:
        """Margins or factors that nobody has given, or that stand beside labels that are no certainty."""
        if self.loss_type == "plain":
            return None
        column, default = ("margin", 0.0) if self.loss_type == "margin" else ("strength", 1.0)
        if all(getattr(each, column) == default for each in comparisons):
            return f"reads the column {column}, and no comparison has one"
        if any(each.prob != 1.0 for each in comparisons):
            return f"reads the column {column}, and some labels are no certainty (`prob`, or ties): how plain a preference is would count twice"
        return None

    def odds(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, ...]:
        """z[P], the log-odds that the chosen response wins; several where a comparison is read several times."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch) -> LossOutput:
        """Sum over comparisons.

        Raises:
            ValueError: if something is missing that it needs.
        """
        zs = self.odds(outputs, batch)
        better, worse = by_pair(batch.scores_B, batch)
        prob_P, margin_P = smoothed(batch.prob_P, self.label_smoothing), (better - worse) / self.unit_of_odds
        losses = [logistic(z - margin_P, prob_P) for z in zs]
        loss_P = sum(losses[1:], losses[0]) / len(losses)
        z_P = sum(zs[1:], zs[0]) / len(zs)
        known = batch.prob_P > 0.5  # a tie has no winner
        return LossOutput(
            total=(loss_P * batch.weight_P).sum(), metrics={"accuracy": Mean.of(z_P > 0, known), "margin": Mean.of(z_P)}
        )

    @property
    def unit_of_odds(self) -> float:
        """How much of what the model says is one of log-odds."""
        return 1.0
