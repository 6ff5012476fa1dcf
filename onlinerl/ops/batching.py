"""Items -> optimizer steps -> micro-batches -> tensors. Pure: the same arguments give the same result on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from onlinerl.batch import Batch
from onlinerl.ops.schedule import schedule
from onlinerl.types import TrainItem, TrainSequence

if TYPE_CHECKING:
    from onlinerl.types.training import Unit

__all__ = ["annotator_number", "collate", "packed_tokens", "padded_tokens", "plan_step", "schedule", "step_units"]

_PER_TOKEN = (
    "reference_logprobs",
    "anchor_logprobs",
    "old_logprobs",
    "behavior_logprobs",
    "values",
    "advantages",
    "returns",
    "token_weights",
)
_DUMMY = TrainSequence(prompt_ids=(0,), response_ids=()).with_(**{name: np.zeros(0, np.float32) for name in _PER_TOKEN})


def step_units(items: Iterable[TrainItem], unit: Unit) -> float:
    """What the summed loss of an optimizer step is divided by; 1 where nothing counts, so that the loss is 0."""
    return sum(item.count(unit) for item in items) or 1.0


def collate(items: Sequence[TrainItem]) -> Batch:
    """One micro-batch of tensors, right-padded with token 0; rows are the items' sequences in order, masks come from lengths.

    Items become rows of `lists_GK`, pairs rows of `pairs_P2` too. Per-token fields are filled only if all sequences
    have them. No items give the dummy that a rank without data runs so that collective operations stay aligned: one row of one prompt
    token and one masked response position, all per-token fields zero, weight 0, no pairs and lists; the loss of it is 0.

    Raises:
        ValueError: if a per-token field does not have one number per response token.
    """
    sequences = [sequence for item in items for sequence in item.sequences]
    weights = [item.weight for item in items for _ in item.sequences]
    starts = np.cumsum([0, *(len(item.sequences) for item in items)]).tolist()
    pairs = [(item, start) for item, start in zip(items, starts, strict=False) if item.is_pair]
    explored = [start + item.exploration for item, start in pairs if item.exploration is not None]
    online = [[start + place for place in item.online] for item, start in pairs]
    pooled = [item.nll_tokens for item in items if item.nll_tokens is not None]
    imitated = [start + item.nll for item, start in pairs if item.nll is not None]
    if not sequences:
        sequences, weights = [_DUMMY], [0.0]

    K = max((len(item.sequences) for item in items), default=1)
    lists = [[*range(start, end), *[-1] * (K - end + start)] for start, end in pairwise(starts)]
    T = max(1, *(len(s.response_ids) for s in sequences))
    prompt_lengths = torch.tensor([len(s.prompt_ids) for s in sequences])
    lengths = torch.tensor([len(s.response_ids) for s in sequences])
    tokens = torch.zeros(
        len(sequences), int(max(prompt_lengths.max() + 1, (prompt_lengths + lengths).max())), dtype=torch.int64
    )
    for row, s in enumerate(sequences):
        ids = (*s.prompt_ids, *s.response_ids)
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)

    return Batch(
        tokens_BS=tokens,
        prompt_lengths_B=prompt_lengths,
        lengths_B=lengths,
        mask_BT=torch.arange(T)[None, :] < lengths[:, None],
        scores_B=_floats(s.score for s in sequences),
        win_rates_B=_floats(s.win_rate for s in sequences),
        pairs_P2=torch.tensor([(start, start + 1) for _, start in pairs], dtype=torch.int64).reshape(-1, 2),
        prob_P=_floats(item.prob for item, _ in pairs),
        weight_P=_floats(item.weight for item, _ in pairs),
        lists_GK=torch.tensor(lists, dtype=torch.int64).reshape(-1, K),
        weight_G=_floats(item.weight for item in items),
        weight_B=_floats(weights),
        policy_weight_B=_floats(s.policy_weight for s in sequences),
        forced_B=torch.tensor([s.forced for s in sequences]) if any(s.forced for s in sequences) else None,
        exploration_P=torch.tensor(explored, dtype=torch.int64) if len(explored) == len(pairs) else None,
        online_PN=_ragged(online) if any(online) else None,
        nll_P=torch.tensor(imitated, dtype=torch.int64) if len(imitated) == len(pairs) else None,
        nll_tokens_G=_floats(pooled) if len(pooled) == len(items) else None,
        annotators_G=torch.tensor([annotator_number(item.annotator) for item in items], dtype=torch.int64),
        **{f"{name}_BT": _per_token(sequences, name, T) for name in _PER_TOKEN},
    )


@cache
def annotator_number(annotator: str) -> int:
    """A number that stands for an annotator, on every rank and in every run the same; small enough (48 bits) to be exact as a float."""
    return int.from_bytes(hashlib.blake2b(annotator.encode(), digest_size=6).digest(), "big")


def padded_tokens(items: Sequence[TrainItem]) -> int:
    """Positions of the rectangle that a micro-batch of these items fills, padding included: what its forward pass costs."""
    rows = [len(s.prompt_ids) + len(s.response_ids) for item in items for s in item.sequences]
    return len(rows) * max(rows, default=0)


def packed_tokens(items: Sequence[TrainItem]) -> int:
    """Positions of the row that their sequences fill one after the other."""
    return sum(item.tokens for item in items)


def plan_step(
    items: Sequence[TrainItem], ranks: int, tokens_per_microbatch: int, *, padding_free: bool = False
) -> list[list[list[TrainItem]]]:
    """Deal the items of one optimizer step out to ranks and micro-batches: `plan[rank][micro]` is a list of items.

    Every item appears exactly once and stays whole. Ranks get about equal numbers of tokens. A micro-batch fills at most
    `tokens_per_microbatch` positions, of a rectangle with its padding or, where `padding_free`, of a row without any, except that a
    bigger item goes alone. All ranks have the same number of micro-batches, as collective operations demand: short ranks are filled up
    with empty ones, and with fewer items than ranks some have nothing else. Without items the plan is empty for every rank.

    Raises:
        ValueError: if `ranks` or `tokens_per_microbatch` is below 1.
    """
    if ranks < 1 or tokens_per_microbatch < 1:
        raise ValueError(f"need at least 1 rank and 1 token, got {ranks} ranks and {tokens_per_microbatch} tokens")
    shares: list[list[TrainItem]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    # Longest first, each to the rank with the least work.
    for tokens, item in sorted(((item.tokens, item) for item in items), key=lambda one: -one[0]):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += tokens
    cut_up = _rows if padding_free else _pack
    plan = [cut_up(share, tokens_per_microbatch) for share in shares]
    depth = max(len(micros) for micros in plan)
    return [micros + [[] for _ in range(depth - len(micros))] for micros in plan]


def _pack(items: Sequence[TrainItem], budget: int) -> list[list[TrainItem]]:
    """Fill micro-batches one after the other with items of falling length, so that neighbours need little padding."""
    micros: list[list[TrainItem]] = []
    rows = width = 0  # of the last one, whose first item is the longest
    for longest, item in sorted(((_longest(item), item) for item in items), key=lambda one: -one[0]):
        rows += len(item.sequences)
        if micros and rows * width <= budget:
            micros[-1].append(item)
        else:
            micros.append([item])
            rows, width = len(item.sequences), longest
    return micros


def _rows(items: Sequence[TrainItem], budget: int) -> list[list[TrainItem]]:
    """First fit: the biggest item first, each into the first row with room for it."""
    rows: list[list[TrainItem]] = []
    room: list[int] = []
    for tokens, item in sorted(((item.tokens, item) for item in items), key=lambda one: -one[0]):
        found = next((number for number, free in enumerate(room) if tokens <= free), None)
        if found is None:
            rows.append([item])
            room.append(budget - tokens)
        else:
            rows[found].append(item)
            room[found] -= tokens
    return rows


def _longest(item: TrainItem) -> int:
    return max(len(s.prompt_ids) + len(s.response_ids) for s in item.sequences)


def _ragged(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int64)


def _floats(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32)


def _per_token(sequences: Sequence[TrainSequence], name: str, width: int) -> Tensor | None:
    columns = [getattr(s, name) for s in sequences]
    if any(column is None for column in columns):
        return None
    padded = torch.zeros(len(sequences), width)
    for row, (s, column) in enumerate(zip(sequences, columns, strict=True)):
        if len(column) != len(s.response_ids):
            raise ValueError(f"{name} has {len(column)} numbers for {len(s.response_ids)} response tokens")
        padded[row, : len(column)] = torch.from_numpy(np.array(column, dtype=np.float32))
    return padded
