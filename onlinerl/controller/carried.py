"""What was last trained of a prompt, which joins its responses when it is sampled again (`Needs.carried`).

Source: "Self-Exploring Language Models: Active Preference Elicitation for Online Alignment" (arXiv 2405.19332), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onlinerl.controller.items import of_group
from onlinerl.controller.iteration import Iteration
from onlinerl.controller.replay import earlier
from onlinerl.types import Group, Rollout


def with_carried(it: Iteration, groups: Sequence[Group]) -> list[Group]:
    """The groups, each with both responses of the pair that was trained of its prompt the last time, the chosen one first. Of several pairs it
    is the one with the largest gap. A group is left as it is if its prompt has given no pair yet.

    Only iterations are read that are complete whatever runs side by side: those up to the one whose weights sample.
    """
    found: dict[str, tuple[Rollout, ...]] = {}
    for number in range(it.sampling_version, 0, -1):
        then, wanted = earlier(it, number), {group.prompt.id for group in groups} - {*found}
        if not wanted:
            break
        sampled = [prompt_id for prompt_id in then.sampled_ids if prompt_id in wanted]
        for group, answer in then.judged(sampled):
            if pairs := of_group(then, group, answer).pairs:
                last = max(pairs, key=lambda pair: pair.gap)
                both = (group.rollouts[last.chosen], group.rollouts[last.rejected])
                found[group.prompt.id] = tuple(replace(rollout, source="carried") for rollout in both)
    return [replace(group, rollouts=(*group.rollouts, *found.get(group.prompt.id, ()))) for group in groups]
