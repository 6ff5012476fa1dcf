"""Which pairs with a teacher's answer are trained: those that the policy can learn, and not too many. No torch.

A chosen response that is far from the policy cannot be learned while a KL holds the policy back ("Mitigating Hallucinations in Large
Vision-Language Models via DPO: On-Policy Data Hold the Key", arXiv 2501.09695), and where one model writes most of the chosen responses, who
wrote a response says which one is chosen ("More is Less: The Pitfalls of Multi-Model Synthetic Preference Data in DPO Safety Alignment",
arXiv 2504.02193).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onlinerl.ops.items import need
from onlinerl.types.seeds import derive_seed

if TYPE_CHECKING:
    from onlinerl.types.training import TrainItem, TrainSequence


def guarded(
    items: Sequence[TrainItem], kept: Sequence[int], percentile: float, max_share: float, decay: float
) -> tuple[list[int], Counter[str]]:
    """The places that are left of `kept`, ascending, and how many pairs were left out for which reason.

    `teacher_unlikely`: the chosen response is the teacher's, and under the reference it is no more probable per token than the share
    `percentile` of the policy's own responses in the new pairs. `teacher_share`: there are more pairs with the teacher's answer, on either
    side, than a share max_share * decay^(t - 1) of those that are trained in iteration t; a hash of each pair says which of them stay.

    Raises:
        ValueError: if reference log-probs are needed and missing.
    """
    said = _of_policy(items, read=percentile > 0)
    newest = max(said, default=1)
    least = float(np.quantile(list(said[newest].values()), percentile)) if said.get(newest) else -np.inf
    own: list[int] = []
    taught: list[tuple[int, int]] = []
    dropped: Counter[str] = Counter()
    for place in kept:
        item = items[place]
        chosen, rejected = item.sequences[:2]
        if "teacher" not in (chosen.source, rejected.source):
            own.append(place)
        elif percentile > 0 and chosen.source == "teacher" and _per_token(chosen) <= least:
            dropped["teacher_unlikely"] += 1
        else:
            ids = [tuple(map(int, s.response_ids)) for s in (chosen, rejected)]
            taught.append((derive_seed("teacher", newest, item.iteration, item.prompt_id, *ids), place))
    share = max_share * decay ** max(0, newest - 1)
    most = len(taught) if share >= 1 else int(share * len(own) / (1.0 - share) + 1e-9)
    dropped["teacher_share"] = max(0, len(taught) - most)
    return sorted([*own, *(place for _, place in sorted(taught)[:most])]), +dropped


def _of_policy(items: Sequence[TrainItem], *, read: bool) -> dict[int, dict[int, float]]:
    """By iteration, the reference log-probs per token of the policy's own responses, each of them once; nothing of them unless they are `read`."""
    found: dict[int, dict[int, float]] = {}
    for item in items:  # each is read from the disk
        known = found.setdefault(item.iteration, {})
        for s in item.sequences[:2] if read else ():
            if s.source in ("policy", "greedy"):
                known[derive_seed(item.prompt_id, tuple(map(int, s.response_ids)))] = _per_token(s)
    return found


def _per_token(sequence: TrainSequence) -> float:
    return float(need(sequence, "reference_logprobs").mean()) if len(sequence.response_ids) else 0.0
