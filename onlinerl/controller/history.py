"""What earlier iterations have sampled and were told, for whoever chooses the prompts of the next one.

All of it is complete before the phase that asks may start, and none of it changes: which iterations are read follows from the number of the
iteration and from `schedule.max_lag`, never from what happens to be there already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from onlinerl.controller.iteration import Iteration
from onlinerl.controller.replay import earlier
from onlinerl.types import Pool, Verdict, Visit


def pool(it: Iteration) -> Pool:
    """What the prompts of an iteration are chosen from."""
    prompts, config = list(it.parts.train_prompts), it.parts.config
    per_iteration = config.prompts.per_iteration
    return Pool(
        prompts=prompts,
        iteration=it.number,
        seed=config.seed,
        per_iteration=per_iteration,
        most=min(it.most_rounds * per_iteration, len(prompts)),
        reuse=config.prompts.reuse,
        asked=Counter(i for t in range(1, it.number) for i in earlier(it, t).sampled_ids),
        visits=_visits(it) if it.parts.config.selection.reads_scores else {},
    )


def _visits(it: Iteration) -> dict[str, Visit]:
    """The last verdict on each prompt up to the iteration that has trained the weights which sample now."""
    found: dict[str, Visit] = {}
    for t in range(it.sampling_version, 0, -1):
        then = earlier(it, t)
        left = [prompt_id for prompt_id in then.sampled_ids if prompt_id not in found]
        for prompt_id, scores in zip(left, _scores(then, left), strict=True):
            if scores:
                found[prompt_id] = Visit(iteration=t, scores=scores)
    return found


def _scores(then: Iteration, prompt_ids: Sequence[str]) -> Iterator[tuple[float, ...]]:
    """Of the policy's own responses to each prompt; empty where nobody has judged them."""
    labels = then.labels().select(prompt_ids)
    # A group is read only where it holds responses of others, because its tokens are read with it.
    groups = then.groups().select(prompt_ids) if then.needs.beside_samples else None
    for label in labels:
        group = next(groups) if groups is not None else None
        result = None if label is None else label.result
        said = result.scores if isinstance(result, Verdict) and result.scores is not None else ()
        drawn = None if group is None else [r.source == "policy" and r.sampler.temperature > 0 for r in group.rollouts]
        own = said if drawn is None else [score for score, ours in zip(said, drawn, strict=False) if ours]
        yield tuple(score for score in own if math.isfinite(score))
