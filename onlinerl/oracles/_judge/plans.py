"""Which pairs of a group are compared, and which response is shown first. Nothing depends on the order in which the responses stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations, permutations
from typing import Literal

Plan = Literal["all_pairs_both", "all_pairs_random_order", "ring", "vs_anchor"]


def cells(plan: Plan, responses: Sequence[str], salt: str) -> list[tuple[int, int]]:
    """Indices (shown first, shown second) of every comparison.

    Args:
        plan: which ones.
        responses: K texts.
        salt: chooses at random where the plan does: the same whenever it is the same.
    """
    k = len(responses)
    if plan == "all_pairs_both":
        return list(permutations(range(k), 2))
    order = sorted(range(k), key=lambda i: (_hash(salt, responses[i]), i))
    if plan == "all_pairs_random_order":
        flipped = {(i, j): _hash(salt, responses[i], responses[j])[0] % 2 == 1 for i, j in combinations(order, 2)}
        return [(j, i) if flip else (i, j) for (i, j), flip in flipped.items()]
    if plan == "ring":
        pairs = [(order[n], order[(n + 1) % k]) for n in range(k if k > 2 else k - 1)]
    else:
        pairs = [(order[0], other) for other in order[1:]]
    return [cell for i, j in pairs for cell in ((i, j), (j, i))]


def count(plan: Plan, k: int) -> int:
    """How many comparisons a group of k responses takes."""
    if k < 2:
        return 0
    ring = 2 * k if k > 2 else 2
    return {
        "all_pairs_both": k * (k - 1),
        "all_pairs_random_order": k * (k - 1) // 2,
        "ring": ring,
        "vs_anchor": 2 * (k - 1),
    }[plan]


def shuffled(responses: Sequence[str], salt: str) -> list[int]:
    """Indices of the responses in an order that depends on what they say and on the salt."""
    return sorted(range(len(responses)), key=lambda i: (_hash(salt, responses[i]), i))


def _hash(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
