"""From judged groups to what is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onlinerl.controller.iteration import Iteration
from onlinerl.types import Judged, Pair, TrainItem


@dataclass(frozen=True, kw_only=True)
class GroupItems:
    """What one judged group gives."""

    items: Sequence[TrainItem]
    pairs: Sequence[Pair] = ()
    """Those that are trained on."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """What was left out, by reason: candidate pairs (the pair builder's reasons), items (the algorithm's, and `truncated`)."""
    contradicted: int = 0
    """Pairs whose winner lost the direct comparison with its own loser; they are trained all the same."""
    truncated: int = 0
    """Items with a response that hit max_new_tokens, kept or dropped."""


def of_group(it: Iteration, judged: Judged) -> GroupItems:
    """The same at every call: pairs and items depend on the group and its verdict only."""
    dropped: Counter[str] = Counter()
    pairs: Sequence[Pair] = []
    if it.parts.algorithm.needs.pairs:
        pairs, reasons = it.parts.pairing.build(judged)
        dropped.update(reasons)
    contradicted = sum(pair.prob < 0.5 for pair in pairs)
    items, left_out = it.parts.algorithm.items(judged, pairs)
    dropped.update(left_out)
    whole = [i for i in items if all(s.finish_reason != "length" for s in i.sequences)]
    truncated = len(items) - len(whole)
    if it.parts.config.training.on_truncated == "drop":
        dropped["truncated"] += truncated
        items = whole
        rollouts = judged.group.rollouts
        pairs = [p for p in pairs if "length" not in {rollouts[i].finish_reason for i in (p.chosen, p.rejected)}]
    return GroupItems(items=items, pairs=pairs, dropped=dropped, contradicted=contradicted, truncated=truncated)
