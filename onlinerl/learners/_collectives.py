"""What the ranks of a learner tell each other beside gradients and weights."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_of_ranks(own: Tensor, ranks: int) -> float:
    """Of all ranks, from this one's sum and count; the same on all of them to the last bit, so that they decide alike."""
    parts: list[list[float]] = [[]] * ranks
    dist.all_gather_object(parts, own.tolist())
    return sum(total for total, _ in parts) / max(1.0, sum(count for _, count in parts))


def every(own: Any, ranks: int) -> list[Any]:
    """What each rank has, by rank."""
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    return parts


def means(totals: Mapping[str, Tensor], count: float, ranks: int, device: torch.device) -> dict[str, float]:
    """Sums and counts of all ranks -> means. Ranks without items know no metric names, so the names travel first."""
    union = sorted({name for part in every(sorted(totals), ranks) for name in part})
    table = torch.stack([totals.get(n, torch.zeros(2)) for n in union]).double()
    table = table.to(device) if device.type == "cuda" else table
    dist.all_reduce(table)
    found = {n: (row[0] / row[1]).item() if row[1] > 0 else float("nan") for n, row in zip(union, table.cpu(), strict=True)}
    found["loss"] = table[union.index("loss"), 0].item() / count
    return found


def bound_collectives(timeout: timedelta) -> None:
    """From now on a rank that waits longer than this for the others fails. Everything before belongs to the start, and its time.

    For all groups, because libraries make some of their own, with torch's default. torch has no public name for this.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)
