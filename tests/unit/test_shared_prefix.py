"""Pairs of steps behind a prefix that responses share (E7): which they are, what they are worth, and what a loss makes of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_llama import llama

from onlinerl.algorithms.aot import Aot
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.ipo import Ipo
from onlinerl.algorithms.orpo import Orpo
from onlinerl.algorithms.rebel import Rebel
from onlinerl.algorithms.simpo import Simpo
from onlinerl.learners._policy import Policy
from onlinerl.ops.batching import collate
from onlinerl.ops.pairs import pair_items
from onlinerl.pairing.shared_prefix import SharedPrefix
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Group, Judged, Pair, Prompt, Rollout, Sampling, Step, TrainItem, Verdict

PROMPT = (50, 51)
# The best response by itself, 9, is in the branch that leads to worse ones: its mean is 4.5, and that of the other 5.
TREE = {(1, 2, 3, 4): 9.0, (1, 2, 3, 5): 0.0, (1, 2, 6, 7): 6.0, (1, 2, 6, 8): 4.0, (9, 9): 20.0}


def judged(tree: dict[tuple[int, ...], float | None], forced: int = 0, **verdict) -> Judged:
    """A group of these responses with their scores (None: not judged), made to begin with the first `forced` of their tokens."""
    rollouts = tuple(
        Rollout(
            token_ids=tokens[forced:],
            prefix_ids=tokens[:forced],
            logprobs=tuple(-float(token) for token in tokens[forced:]),
            text=" ".join(map(str, tokens)),
            finish_reason="stop",
            policy_version=0,
            sampler=Sampling(),
            seed=seed,
        )
        for seed, tokens in enumerate(tree)
    )
    scores = tuple(math.nan if score is None else score for score in tree.values())
    unjudged = tuple(i for i, score in enumerate(tree.values()) if score is None)
    said = Verdict(annotator="a", oracle_version="v", scores=scores, unjudged=unjudged, **verdict)
    return Judged(group=Group(prompt=Prompt(id="p", text="x", token_ids=PROMPT), rollouts=rollouts), verdict=said)


def steps(pairs: list[Pair]) -> list[tuple[tuple[int, int, tuple[int, ...]], ...]]:
    return [tuple((step.start, step.end, step.leaves) for step in pair.steps or ()) for pair in pairs]


def test_where_responses_part_the_best_branch_is_paired_with_the_worst():
    pairs, dropped = SharedPrefix().build(judged(TREE))
    assert steps(pairs) == [
        ((2, 3, (2, 3)), (2, 3, (0, 1))),  # 6 over 3, by the means 5 and 4.5
        ((3, 4, (0,)), (3, 4, (1,))),
        ((3, 4, (2,)), (3, 4, (3,))),
    ]
    assert [pair.gap for pair in pairs] == [0.5, 9.0, 2.0]
    assert not dropped


def test_what_a_branch_is_worth_is_not_the_label_of_one_response():
    """The fault would be that 3, which leads to the best response, is preferred."""
    first = SharedPrefix().build(judged(TREE))[0][0]
    assert first.steps is not None
    assert set(first.steps[0].leaves) == {2, 3}
    (item,), _ = pair_items(judged(TREE), [first])
    assert [sequence.score for sequence in item.sequences] == [5.0, 4.5]
    rates = judged(TREE).verdict.win_rates()
    assert [sequence.win_rate for sequence in item.sequences] == [rates[2:4].mean(), rates[:2].mean()]


def test_the_probability_is_the_mean_over_the_responses_of_both_branches():
    first = SharedPrefix().build(judged(TREE))[0][0]
    over = [1 / (1 + math.exp(-(ours - theirs))) for ours in (6.0, 4.0) for theirs in (9.0, 0.0)]
    assert first.prob == pytest.approx(sum(over) / 4)


def test_counts_of_leaves_where_they_are_asked_for():
    """N_w / (N_w + N_l): equal ones give 1/2."""
    counted = SharedPrefix(prob="leaf_counts")
    assert [pair.prob for pair in counted.pairs(judged(TREE))[0]] == [0.5, 0.5, 0.5]
    more = {**TREE, (1, 2, 6, 10): 5.0}
    assert counted.build(judged(more))[0][0].prob == 3 / 5
    even = tuple(tuple(0.51 if i > j else 0.49 for j in range(5)) for i in range(5))
    near = replace(judged(TREE), verdict=replace(judged(TREE).verdict, scores=None, preferences=even))
    assert SharedPrefix().pairs(near)[1]["tie"] > 0
    assert counted.pairs(near)[1]["tie"] == 0, "it is no tie of the oracle"
    assert (SharedPrefix().soft, counted.soft) == (None, "prob")


def test_the_second_best_makes_a_harder_pair():
    three = {(1, 2): 0.0, (1, 3): 1.0, (1, 4): 2.0}
    assert steps(SharedPrefix().build(judged(three))[0]) == [((1, 2, (2,)), (1, 2, (0,)))]
    assert steps(SharedPrefix(choose="second").build(judged(three))[0]) == [((1, 2, (2,)), (1, 2, (1,)))]


def test_a_prefix_that_is_too_short_counts_for_nothing():
    assert [pair[0][0] for pair in steps(SharedPrefix(min_prefix=3).build(judged(TREE))[0])] == [3, 3]
    assert SharedPrefix(min_prefix=4).build(judged(TREE)) == ([], {"no_prefix": 1})
    at_once = SharedPrefix(min_prefix=0).build(judged(TREE))[0]
    assert steps(at_once)[0] == ((0, 2, (4,)), (0, 2, (0, 2, 3, 1))), "the first tokens are steps too"
    with pytest.raises(ValidationError):
        SharedPrefix(min_prefix=-1)


def test_ties_and_small_gaps_are_counted():
    equal = {(1, 2, 3): 1.0, (1, 2, 4): 3.0, (1, 5, 3): 2.0, (1, 5, 4): 2.0}
    pairs, dropped = SharedPrefix().build(judged(equal))
    assert (steps(pairs), dropped) == ([((2, 3, (1,)), (2, 3, (0,)))], {"tie": 2})
    assert SharedPrefix(min_gap=2.0).build(judged(equal)) == ([], {"tie": 2, "gap": 1})


def test_a_response_that_ends_where_others_go_on_has_no_step_there():
    ends = {(1, 2): 9.0, (1, 2, 3): 1.0, (1, 2, 4): 0.0}
    assert steps(SharedPrefix().build(judged(ends))[0]) == [((2, 3, (1,)), (2, 3, (2,)))]
    assert SharedPrefix().build(judged({(1, 2): 9.0, (1, 2, 3): 1.0})) == ([], {"no_prefix": 1})


def test_a_response_that_nobody_judged_is_not_there():
    pairs, _ = SharedPrefix().build(judged({**TREE, (1, 2, 3, 4): None}))
    assert steps(pairs) == [((2, 3, (2, 3)), (2, 4, (1,))), ((3, 4, (2,)), (3, 4, (3,)))]


@pytest.mark.parametrize("forced", [1, 2, 3])
def test_what_responses_were_made_to_begin_with_is_a_part_of_what_they_share(forced):
    """Where it reaches beyond the place where two part, there is nothing left of it to train."""
    tree = {tokens: score for tokens, score in TREE.items() if tokens[0] == 1}
    plain = SharedPrefix().build(judged(tree))[0]
    assert steps(SharedPrefix().build(judged(tree, forced))[0]) == steps(plain)
    for pair in plain:
        if forced > pair.steps[0].start:
            continue
        one, other = (pair_items(group, [pair])[0][0] for group in (judged(tree), judged(tree, forced)))
        for ours, theirs in zip(one.sequences, other.sequences, strict=True):
            assert (ours.prompt_ids, tuple(ours.response_ids)) == (theirs.prompt_ids, tuple(theirs.response_ids))
            assert (ours.prefix, ours.behavior_logprobs.tolist()) == (theirs.prefix, theirs.behavior_logprobs.tolist())


def test_sequences_begin_with_the_first_token_that_differs():
    items, dropped = pair_items(judged(TREE), SharedPrefix().build(judged(TREE))[0])
    assert [[(s.prompt_ids, tuple(s.response_ids)) for s in item.sequences] for item in items] == [
        [((50, 51, 1, 2), (6,)), ((50, 51, 1, 2), (3,))],
        [((50, 51, 1, 2, 3), (4,)), ((50, 51, 1, 2, 3), (5,))],
        [((50, 51, 1, 2, 6), (7,)), ((50, 51, 1, 2, 6), (8,))],
    ]
    assert [s.behavior_logprobs.tolist() for item in items for s in item.sequences] == [[-6], [-3], [-4], [-5], [-7], [-8]]
    assert not dropped


def test_only_what_ends_with_a_response_that_was_cut_is_cut():
    group = judged(TREE)
    first, *others = group.group.rollouts
    cut = replace(group, group=replace(group.group, rollouts=(replace(first, finish_reason="length"), *others)))
    pairs = SharedPrefix().build(cut)[0]
    assert [cut.is_cut(pair) for pair in pairs] == [False, True, False]
    found = [[s.finish_reason for s in item.sequences] for item in pair_items(cut, pairs)[0]]
    assert found == [["stop", "stop"], ["length", "stop"], ["stop", "stop"]]
    assert cut.is_cut(Pair(chosen=0, rejected=1, prob=0.9))
    assert not cut.is_cut(Pair(chosen=2, rejected=1, prob=0.9))


LONG = {(*range(1, 9), 20, 21, 22): 2.0, (*range(1, 9), 30, 31): 1.0, (*range(1, 9), 30, 33, 34): -1.0}
LOSSES = [
    Dpo(nll_coef=0.5, dpop_lambda=1.0),
    Dpo(length_norm=True, label_smoothing=0.1),
    Ipo(),
    Simpo(nll_coef=0.5),
    Orpo(),
    Rebel(),
    Aot(),
]


@pytest.mark.parametrize("algorithm", LOSSES, ids=lambda each: type(each).__name__)
def test_a_common_prefix_gets_exactly_no_gradient(algorithm: Algorithm):
    """The gradient of each final hidden state of a real model: only those before tokens of the steps have one."""
    group = judged(LONG)
    items, _ = algorithm.items(group, SharedPrefix().pairs(group)[0])
    assert len(items) == 2
    gradients, prompts, lengths = gradients_of(algorithm, items)
    for gradient, prompt, length in zip(gradients, prompts, lengths, strict=True):
        assert prompt >= len(PROMPT) + 8
        assert gradient[: prompt - 1].abs().max() == 0, "tokens that both have in common are predicted there"
        assert (gradient[prompt - 1 : prompt - 1 + length].abs().amax(dim=1) > 0).all()
    # The fault that this is there for: the same responses whole.
    whole, _ = algorithm.items(group, [Pair(chosen=0, rejected=1, prob=0.9)])
    assert gradients_of(algorithm, whole)[0][0][len(PROMPT) : len(PROMPT) + 7].abs().max() > 0


def gradients_of(algorithm: Algorithm, items: list[TrainItem]) -> tuple[torch.Tensor, list[int], list[int]]:
    """Of the final hidden states [B, S, H], with the lengths of prompts and responses."""
    known = [
        replace(
            item,
            sequences=tuple(s.with_(reference_logprobs=np.full(len(s.response_ids), -2.0, np.float32)) for s in item.sequences),
        )
        for item in items
    ]
    batch, model = collate(known), llama()
    states: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        states.append(output)

    model.model.norm.register_forward_hook(keep)
    algorithm.loss(Policy(model)(batch), batch).total.backward()
    assert states[0].grad is not None
    return states[0].grad, batch.prompt_lengths_B.tolist(), batch.lengths_B.tolist()


def test_what_is_left_out_is_what_pair_items_leaves_out():
    group = judged({**TREE, (1, 2, 3, 4): None})
    stale = Pair(chosen=0, rejected=1, prob=0.9, steps=(Step(start=3, end=4, leaves=(0,)), Step(start=3, end=4, leaves=(1,))))
    assert pair_items(group, [stale]) == ([], Counter(unjudged=1))
