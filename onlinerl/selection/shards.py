"""Disjoint shards of the prompts, one for each iteration.

Sources: "Self-Play Preference Optimization for Language Model Alignment", "Direct Nash Optimization: Teaching Language Models to
Self-Improve with General Preferences" (arXiv 2404.03715), "RLHF Workflow: From Reward Modeling to Online RLHF".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field

from onlinerl.protocols.selection import Selector
from onlinerl.types import Objection, Prompt, RawPrompt, derive_seed
from onlinerl.types.selection import Pool, Selected, SelectionPlan, content

P = TypeVar("P", Prompt, RawPrompt)


class Shards(Selector):
    """Iteration t takes prompts of shard t, in the order of a hash of seed and prompt, whose remainder is the shard.

    What a shard holds depends on no other prompt, so a prompt more moves none of the others, and on nothing that a run has done. A prompt that is
    there twice, under two ids, is taken once. Behind the last shard comes the first one again, with prompts of it that were sampled least.
    """

    name: str = "shards"
    shards: int = Field(3, ge=1)
    """How many there are: as many as iterations, or fewer with `prompts.reuse`."""

    def select(self, pool: Pool) -> list[Selected]:
        """As many of the shard's prompts as are asked for and there are."""
        number = (pool.iteration - 1) % self.shards
        there = _by_shard(pool.open, self.shards, pool.seed)[number]
        there.sort(
            key=lambda prompt: pool.asked.get(prompt.id, 0)
        )  # stable: prompts that were sampled as often stay in their order
        return [
            Selected(prompt_id=prompt.id, probability=1.0, reason=f"shard {number + 1} of {self.shards}")
            for prompt in there[: pool.most]
        ]

    def objection(self, plan: SelectionPlan) -> Objection | None:
        """Too few shards, or one that is too small."""
        if plan.iterations > self.shards and not plan.reuse:
            return Objection(
                field="selection.shards",
                cause=f"is {self.shards}, and {plan.iterations} iterations take one each",
                fix=f"set it to {plan.iterations}, or prompts.reuse=true to begin with the first one again",
            )
        used = range(min(plan.iterations, self.shards))
        by_shard = _by_shard(list(plan.prompts), self.shards, plan.seed)  # type: ignore[type-var]
        least = min(len(by_shard[number]) for number in used)
        if least < plan.per_iteration:
            return Objection(
                field="prompts.per_iteration",
                cause=f"is {plan.per_iteration}, and the smallest of {self.shards} shards holds {least} prompts",
                fix=f"lower it to {least}, lower selection.shards, or add prompts"
                if least
                else "lower selection.shards, or add prompts",
            )
        return None


def _by_shard(prompts: Sequence[P], shards: int, seed: int) -> dict[int, list[P]]:
    """The prompts of each shard in their order, each question once."""
    found: dict[int, list[P]] = defaultdict(list)
    once = {content(prompt): prompt for prompt in sorted(prompts, key=lambda prompt: prompt.id, reverse=True)}
    keys = {asked: (derive_seed(seed, "shard", asked), asked) for asked in once}
    for asked in sorted(once, key=lambda asked: keys[asked]):
        found[keys[asked][0] % shards].append(once[asked])
    return found
