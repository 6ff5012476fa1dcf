from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinerl.ops.batching import collate, packed_tokens, padded_tokens, plan_step, schedule
from onlinerl.types import TrainItem, TrainSequence


def sequence(prompt: int, response: int, **fields) -> TrainSequence:
    return TrainSequence(prompt_ids=(7,) * prompt, response_ids=tuple(range(20, 20 + response)), **fields)


def item(*lengths: tuple[int, int], prob=1.0, weight=1.0, **fields) -> TrainItem:
    return TrainItem(prompt_id="p", sequences=tuple(sequence(*n, **fields) for n in lengths), prob=prob, weight=weight)


def test_collate_pads_right_and_masks_by_length():
    batch = collate([item((2, 3), weight=0.5), item((4, 1))])
    assert batch.tokens_BS.tolist() == [[7, 7, 20, 21, 22], [7, 7, 7, 7, 20]]
    assert batch.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert batch.prompt_lengths_B.tolist() == [2, 4]
    assert batch.lengths_B.tolist() == [3, 1]
    assert batch.weight_B.tolist() == [0.5, 1.0]
    assert batch.pairs_P2.shape == (0, 2)
    assert batch.sequence_mask_BS.tolist() == [[True] * 5, [True] * 5]


def test_tokens_equal_to_the_padding_are_not_masked():
    zeros = TrainSequence(prompt_ids=(0,), response_ids=(0, 0, 0))
    batch = collate([TrainItem(prompt_id="p", sequences=(zeros,)), item((1, 4))])
    assert batch.mask_BT.tolist() == [[True, True, True, False], [True] * 4]


def test_pairs_point_at_their_rows():
    batch = collate([item((1, 1)), item((1, 2), (1, 3), prob=0.75, weight=2.0), item((1, 1), (1, 4), prob=0.6)])
    assert batch.pairs_P2.tolist() == [[1, 2], [3, 4]]
    assert batch.lengths_B[batch.pairs_P2].tolist() == [[2, 3], [1, 4]]
    assert batch.prob_P.tolist() == pytest.approx([0.75, 0.6])
    assert batch.weight_P.tolist() == [2.0, 1.0]
    assert batch.weight_B.tolist() == [1.0, 2.0, 2.0, 1.0, 1.0]


def test_lists_point_at_their_rows_whatever_their_lengths():
    batch = collate([item((1, 1)), item((1, 2), (1, 3), (1, 4), weight=2.0), item((1, 1), (1, 4))])
    assert batch.lists_GK.tolist() == [[0, -1, -1], [1, 2, 3], [4, 5, -1]]
    assert batch.weight_G.tolist() == [1.0, 2.0, 1.0]
    assert collate([]).lists_GK.shape == (0, 1)


def test_per_token_fields_are_filled_only_if_all_sequences_have_them():
    full = item((1, 2), reference_logprobs=np.array([-1.0, -2.0]), old_logprobs=np.array([-3.0, -4.0]), score=3.0, win_rate=0.8)
    part = item((1, 1), reference_logprobs=np.array([-5.0]))
    anchored = item((1, 2), anchor_logprobs=np.array([-6.0, -7.0]))
    batch = collate([full, part])
    assert batch.reference_logprobs_BT.tolist() == [[-1.0, -2.0], [-5.0, 0.0]]
    assert batch.old_logprobs_BT is None
    assert batch.advantages_BT is None
    assert batch.scores_B.tolist() == [3.0, 0.0]
    assert batch.win_rates_B.tolist() == pytest.approx([0.8, 0.5])
    assert collate([full]).old_logprobs_BT.tolist() == [[-3.0, -4.0]]
    assert batch.anchor_logprobs_BT is None
    assert collate([anchored]).anchor_logprobs_BT.tolist() == [[-6.0, -7.0]]


def test_a_field_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="reference_logprobs has 1 numbers for 2 response tokens"):
        collate([item((1, 2), reference_logprobs=np.array([-1.0]))])


def test_empty_response_keeps_one_masked_position():
    batch = collate([item((3, 0))])
    assert batch.mask_BT.tolist() == [[False]]
    assert batch.tokens_BS.shape == (1, 4)


def test_the_dummy_of_a_rank_without_data():
    batch = collate([])
    assert batch.tokens_BS.shape == (1, 2)
    assert (batch.prompt_lengths_B.tolist(), batch.lengths_B.tolist()) == ([1], [0])
    assert batch.mask_BT.tolist() == [[False]]
    assert batch.pairs_P2.shape == (0, 2)
    assert batch.weight_B.tolist() == [0.0]
    for name in (
        "reference_logprobs_BT",
        "anchor_logprobs_BT",
        "old_logprobs_BT",
        "behavior_logprobs_BT",
        "values_BT",
        "advantages_BT",
        "returns_BT",
    ):
        assert batch.need(name).tolist() == [[0.0]]


LENGTHS = st.tuples(st.integers(1, 6), st.integers(0, 30))
ITEMS = st.lists(st.lists(LENGTHS, min_size=1, max_size=2).map(lambda lengths: item(*lengths)), max_size=20)


@given(items=ITEMS, ranks=st.integers(1, 5), budget=st.integers(1, 120), padding_free=st.booleans())
@settings(max_examples=200, deadline=None)
def test_plan_covers_every_item_once_within_the_budget_with_equal_depth(items, ranks, budget, padding_free):
    positions = packed_tokens if padding_free else padded_tokens
    plan = plan_step(items, ranks, budget, padding_free=padding_free)
    assert len(plan) == ranks
    assert len({len(micros) for micros in plan}) == 1
    planned = [i for micros in plan for micro in micros for i in micro]
    assert sorted(map(id, planned)) == sorted(map(id, items))
    for micros in plan:
        for micro in micros:
            assert len(micro) <= 1 or positions(micro) <= budget
        filled = [bool(micro) for micro in micros]
        assert filled == sorted(filled, reverse=True)  # dummies come last
    loads = [sum(i.tokens for micro in micros for i in micro) for micros in plan]
    assert max(loads) - min(loads) <= max((i.tokens for i in items), default=0)
    assert [[[id(i) for i in micro] for micro in micros] for micros in plan] == [
        [[id(i) for i in micro] for micro in micros] for micros in plan_step(items, ranks, budget, padding_free=padding_free)
    ]
    if items:  # no micro-batch in which every rank runs a dummy
        assert all(any(micros[m] for micros in plan) for m in range(len(plan[0])))


def test_plan_keeps_similar_lengths_together():
    long, short = [item((2, 98)) for _ in range(2)], [item((2, 8)) for _ in range(20)]
    mixed = [short[0], long[0], *short[1:], long[1]]
    plan = plan_step(mixed, 1, 200)
    assert [[i.tokens for i in micro] for micro in plan[0]] == [[100, 100], [10] * 20]


def test_plan_pairs_up_by_their_longest_response_not_by_their_sum():
    even, long, small, lanky = item((1, 9), (1, 9)), item((1, 15), (1, 0)), item((1, 8), (1, 7)), item((1, 14), (1, 0))
    assert plan_step([even, long, small, lanky], 1, 64) == [[[long, lanky], [even, small]]]


def test_without_padding_a_row_takes_whatever_fits():
    long, middle, short = item((2, 58)), item((2, 28)), item((2, 8))
    items = [short, long, middle, short, short, middle]
    assert plan_step(items, 1, 100, padding_free=True) == [[[long, middle, short], [middle, short, short]]]
    assert plan_step(items, 1, 100) == [[[long], [middle, middle, short], [short, short]]]
    assert plan_step([short, long], 1, 10, padding_free=True) == [[[long], [short]]]


def test_plan_with_fewer_items_than_ranks():
    only = item((1, 3), (1, 2))
    assert plan_step([only], 3, 100) == [[[only]], [[]], [[]]]
    assert plan_step([], 2, 100) == [[], []]


def test_an_item_over_the_budget_goes_alone():
    big, small = item((1, 50)), item((1, 1))
    assert plan_step([small, big, small], 1, 10) == [[[big], [small, small]]]


def test_padded_tokens_counts_the_rectangle():
    assert padded_tokens([item((1, 9), (1, 1)), item((2, 2))]) == 30
    assert padded_tokens([]) == 0
    batch = collate([item((1, 9), (1, 1)), item((2, 2))])
    assert batch.tokens_BS.numel() == 30


@pytest.mark.parametrize(("ranks", "budget"), [(0, 10), (2, 0)])
def test_plan_refuses_nonsense(ranks, budget):
    with pytest.raises(ValueError, match="at least 1"):
        plan_step([item((1, 1))], ranks, budget)


@given(count=st.integers(0, 40), size=st.integers(1, 9), epochs=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_schedule_visits_every_item_once_per_epoch(count, size, epochs, seed):
    steps = schedule(count, size, epochs, seed)
    per_epoch = -(-count // size)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        chunk = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for step in chunk for i in step) == list(range(count))
        assert all(len(step) == size for step in chunk[:-1])
    assert steps == schedule(count, size, epochs, seed)


def test_schedule_depends_on_seed_and_epoch():
    assert schedule(50, 50, 1, seed=0) != schedule(50, 50, 1, seed=1)
    first, second = schedule(50, 50, 2, seed=0)
    assert first != second
    assert first != list(range(50))
    with pytest.raises(ValueError, match="batch_size"):
        schedule(5, 0, 1, 0)


def test_batch_survives_the_mask_arithmetic_of_different_prompts():
    batch = collate([item((5, 1)), item((1, 5))])
    starts = batch.prompt_lengths_B[:, None] + torch.arange(batch.mask_BT.shape[1])[None]
    gathered = batch.tokens_BS.gather(1, starts.clamp(max=batch.tokens_BS.shape[1] - 1))
    assert gathered[batch.mask_BT].tolist() == [20, 20, 21, 22, 23, 24]
