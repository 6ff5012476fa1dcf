"""What earlier iterations have sampled and were told, for whoever chooses the prompts of the next one.

All of it is complete before the phase that asks may start, and none of it changes: which iterations are read follows from the number of the
iteration and from `schedule.max_lag`, never from what happens to be there already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from onlinerl.controller.iteration import Iteration
from onlinerl.controller.replay import earlier
from onlinerl.types import Pool, Verdict, Visit


def pool(it: Iteration) -> Pool:
    """What the prompts of an iteration are chosen from."""
    prompts, config = list(it.parts.train_prompts), it.parts.config
    selector, per_iteration = config.selection, config.prompts.per_iteration
    known = range(1, it.sampling_version + 1)  # up to the iteration that has trained the weights which sample now
    return Pool(
        prompts=prompts,
        iteration=it.number,
        seed=config.seed,
        per_iteration=per_iteration,
        most=min(it.most_rounds * per_iteration, len(prompts)),
        reuse=config.prompts.reuse,
        asked=Counter(i for t in range(1, it.number) for i in earlier(it, t).sampled_ids),
        visits=_visits(it, reversed(known)) if selector.reads_scores else {},
        first_visits=_visits(it, known) if selector.reads_first_visits else {},
    )


def _visits(it: Iteration, iterations: Iterable[int]) -> dict[str, Visit]:
    """The verdict on each prompt in the first of these iterations that has one."""
    found: dict[str, Visit] = {}
    for t in iterations:
        then = earlier(it, t)
        left = [prompt_id for prompt_id in then.sampled_ids if prompt_id not in found]
        for prompt_id, said in zip(left, _said(then, left), strict=True):
            if scores := tuple(score for score, _ in said):
                names = [name for name in it.parts.config.selection.components if name in said[0][1]]
                others = {name: tuple(components[name] for _, components in said) for name in names}
                reused_from = then.reused.get(prompt_id)
                found[prompt_id] = Visit(iteration=t, scores=scores, components=others, reused_from=reused_from)
    return found


def _said(then: Iteration, prompt_ids: Sequence[str]) -> Iterator[list[tuple[float, dict[str, float]]]]:
    """The score of each of the policy's own responses to each prompt, and its other scores; empty where nobody has judged them."""
    labels = then.labels().select(prompt_ids)
    # A group is read only where it holds responses of others, because its tokens are read with it.
    groups = then.groups().select(prompt_ids) if then.needs.beside_samples else None
    for label in labels:
        group = next(groups) if groups is not None else None
        result = None if label is None else label.result
        if not isinstance(result, Verdict) or result.scores is None:
            yield []
            continue
        others = result.components or {}
        drawn = None if group is None else [r.source == "policy" and r.sampler.temperature > 0 for r in group.rollouts]
        ours = range(len(result.scores)) if drawn is None else [k for k, own in enumerate(drawn) if own]
        yield [
            (result.scores[k], {name: values[k] for name, values in others.items()})
            for k in ours
            if k < len(result.scores) and math.isfinite(result.scores[k])
        ]
