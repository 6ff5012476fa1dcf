"""Reward-augmented data: "Reward-Augmented Data Enhances Direct Preference Alignment of LLMs"."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from onlinerl.algorithms._base import base_loss
from onlinerl.algorithms._margin import Margin
from onlinerl.ops.items import train_sequences
from onlinerl.protocols.algorithm import by_knobs
from onlinerl.types.goals import Goals

if TYPE_CHECKING:
    from onlinerl.protocols.needs import Needs
    from onlinerl.types.labels import Judged
    from onlinerl.types.plan import Plan
    from onlinerl.types.training import TrainItem, TrainSequence


class RewardAugmented(Margin):
    """A loss of the margin on each pair twice: where the prompt asks for the winner's score the winner is chosen, and where it asks for the
    loser's the loser is. So a good loser is not unlearned, but learned as what it is.

    A score is a goal from 1 to `goal_scale`, which the prompt tells the model. Responses are sampled with the highest goal, and evaluated with it;
    the oracle sees prompts without goals. A response earns -(goal - its own)^2 then, which is what `pair_weights` and `score_margin` read.

    Not the paper's: `goals`, score there; the scale of an oracle's scores is known to who runs it (`score_min`, `score_max`), ranks need none.
    Not the paper's: `ties`, keep in its script; a tie gives two records that say the opposite of each other.
    """

    base: str = "dpo"
    """A loss of the margin. What only it has (`tau` of `ipo`) is at its default; `beta` and what may modify any of them are set here."""
    goal_scale: int = Field(10, ge=2)
    """The highest goal."""
    goals: Literal["rank", "score"] = "rank"
    """How scores become goals: by how many of the other responses to the prompt are worse, which asks nothing of the scores (quantiles within
    the group), or by where they are between `score_min` and `score_max`."""
    score_min: float | None = None
    """The score that goal 1 stands for, for `goals: score`; a lower one counts as it."""
    score_max: float | None = Field(None, validate_default=True)
    """The score that the goal `goal_scale` stands for; a higher one counts as it."""
    ties: Literal["drop", "keep"] = "drop"
    """What becomes of a pair whose two scores are the same goal: with `keep`, as in the authors' script, it has both labels."""
    goal_text: str = (
        "You are an assistant that generates responses for the instruction while implicitly achieving the following target score (on a scale of "
        "1-{scale}, where 1 is lowest and {scale} is highest): {goal}."
    )
    """What a prompt says, with {goal} and {scale} where they go."""
    goal_place: Literal["system", "user"] = "system"
    """In a system turn of a conversation, or before its last user turn. A text that is continued always begins with it."""

    @field_validator("base")
    @classmethod
    def _is_a_loss(cls, value: str) -> str:
        base_loss(value)
        return value

    @field_validator("score_max")
    @classmethod
    def _has_a_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        lowest, ranged = info.data.get("score_min"), info.data.get("goals") == "score"
        if {value is not None, lowest is not None} != {ranged}:
            raise ValueError("it, score_min and goals=score belong together: set all three, or none")
        if value is not None and lowest is not None and not lowest < value:
            raise ValueError(f"it must be above score_min, {lowest:g}")
        return value

    @field_validator("goal_text")
    @classmethod
    def _says_the_goal(cls, value: str) -> str:
        if "{goal}" not in value:
            raise ValueError("it does not say the goal: write {goal} where it goes")
        return value

    @by_knobs
    def needs(self) -> Needs:
        """Of a loss of the margin, with goals."""
        return replace(super().needs, goals=Goals(scale=self.goal_scale, text=self.goal_text, place=self.goal_place))

    def remarks(self, plan: Plan) -> list[str]:
        """What whoever uses the model must know."""
        said = self.needs.goals.said(self.goal_scale) if self.needs.goals else ""
        return [f"the policy is sampled and evaluated with a goal in its prompts; an exported model expects it too: {said!r}"]

    def most_items(self, samples: int, pairs: int) -> int:
        """Each pair twice."""
        return 2 * pairs

    def phi(self, z_P: Tensor) -> Tensor:
        """That of the base."""
        return base_loss(self.base).phi(z_P)

    def augmented(self, judged: Judged, items: Sequence[TrainItem]) -> tuple[list[TrainItem], Counter[str]]:
        """Each pair with the winner's goal, and with the loser's as its opposite. Left out: `tie`, pairs of one goal.

        Raises:
            ValueError: if the prompt carries no goals.
        """
        prompts = judged.group.prompt.goal_ids
        if len(prompts) < self.goal_scale:
            raise ValueError(
                f"prompt {judged.group.prompt.id!r} carries {len(prompts)} goals; declare `goals` in the algorithm's `needs`"
            )
        known = sorted(s.score for s in train_sequences(judged).values()) if items else []
        made: list[TrainItem] = []
        for item in items:
            winner, loser = item.sequences
            high, low = self.goal(winner.score, known), self.goal(loser.score, known)
            if high == low and self.ties == "drop":
                continue
            for goal, chosen, rejected in ((high, (winner, high), (loser, low)), (low, (loser, low), (winner, high))):
                two = tuple(_told(s, prompts[goal - 1], goal, own) for s, own in (chosen, rejected))
                made.append(replace(item, sequences=two))
        ties = len(items) - len(made) // 2
        return made, Counter(tie=ties) if ties else Counter()

    def goal(self, score: float, known: Sequence[float]) -> int:
        """From 1 to `goal_scale`. `known`: the scores of all responses to the prompt, ascending."""
        if self.score_min is not None and self.score_max is not None:
            place = min(1.0, max(0.0, (score - self.score_min) / (self.score_max - self.score_min)))
        else:  # of several that are equal, the middle
            place = (bisect_left(known, score) + bisect_right(known, score) - 1) / 2 / max(1, len(known) - 1)
        return 1 + int(place * (self.goal_scale - 1) + 0.5)


def _told(sequence: TrainSequence, prompt_ids: tuple[int, ...], goal: int, own: int) -> TrainSequence:
    """The response to the prompt that asks for `goal`, which earns how near it comes; with what it begins with as context."""
    begun = sequence.prompt_ids[len(sequence.prompt_ids) - sequence.prefix :]
    return sequence.with_(prompt_ids=(*prompt_ids, *begun), score=-float((goal - own) ** 2))
