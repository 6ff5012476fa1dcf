"""What pairs count beside one another, what their tokens count, and the stored answer that is imitated beside them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_batches import F_PLUS, ITEM, ROWS, evaluate, judged, pair, sequence, single, values

from onlinerl import registry
from onlinerl.algorithms._margin import Margin
from onlinerl.algorithms._pairwise import Pairwise
from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.selm import Selm
from onlinerl.ops.batching import collate
from onlinerl.ops.pair_modifiers import apart, by_source, normalized, weighed
from onlinerl.protocols.algorithm import Algorithm
from onlinerl.types import Pair

ALL = {name: registry.load("algorithms", name, Algorithm) for name in registry.names("algorithms")}
PAIRWISE = [name for name, kind in ALL.items() if issubclass(kind, Pairwise)]
MARGINS = [name for name, kind in ALL.items() if issubclass(kind, Margin)]


def with_gap(gap: float, **changes):
    return replace(pair(sequence(2, score=gap), sequence(2, 50, score=0.0)), **changes)


def weights(items, **knobs) -> list[float]:
    return [item.weight for item in Dpo(**knobs).prepare(items)]


def test_value_by_hand():
    """Pairs of classes 3, 2 and 1, whose mean is 2: 1.5, 1 and 0.5 times the loss of each."""
    items = [replace(ITEM, sequences=(ITEM.sequences[0].with_(score=s), ITEM.sequences[1])) for s in (3.0, 2.0, 1.0)]
    algorithm = Dpo(pair_weights="strength", strength_thresholds=[1.0, 2.0])
    made = list(algorithm.prepare(items))
    assert [item.weight for item in made] == pytest.approx([1.5, 1.0, 0.5])
    rows = (-0.5, -2.5, -1.0, -2.5, -1.5, -2.5)  # D_w = 2, 0 and -2, D_l = -1
    losses = [math.log1p(math.exp(-0.1 * (d + 1))) for d in (2, 0, -2)]
    expected = (1.5 * losses[0] + losses[1] + 0.5 * losses[2]) / 3
    assert evaluate(algorithm, made, rows)[0] == pytest.approx(expected, rel=1e-6)


def test_a_threshold_is_the_first_gap_of_its_class():
    items = [with_gap(gap) for gap in (-1.0, 0.0, 0.99, 1.0, 5.0)]
    found = weights(items, pair_weights="strength", strength_thresholds=[1.0])
    assert np.array(found) / found[0] == pytest.approx([1, 1, 1, 2, 2])


def test_each_prompt_counts_as_much_as_any_other():
    items = [with_gap(1.0, prompt_id=prompt) for prompt in "ppq"]
    assert weights(items, pair_weights="per_prompt") == pytest.approx([0.75, 0.75, 1.5])
    again = [*items, with_gap(1.0, prompt_id="p", iteration=1)]  # the same prompt in another iteration is another one
    assert weights(again, pair_weights="per_prompt") == pytest.approx([2 / 3, 2 / 3, 4 / 3, 4 / 3])


def test_older_pairs_count_less():
    items = [with_gap(1.0, iteration=t) for t in (3, 2, 1)]
    assert weights(items, pair_weights="age") == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert weights(items, pair_weights="age", pair_age_decay=1.0) == [1.0, 1.0, 1.0]
    assert weights(items[1:], pair_weights="age") == pytest.approx([4 / 3, 2 / 3]), "beside the newest that there are"


def test_pairs_count_by_who_wrote_the_two():
    """Of the policy alone 1, beside a teacher 0.5, of an earlier iteration 0.25, and both: a mean of 1.875 / 4."""
    taught = [with_gap(1.0), with_gap(1.0), with_gap(1.0, iteration=-1), with_gap(1.0, iteration=-1)]
    for place, side in ((1, 0), (3, 1)):
        two = list(taught[place].sequences)
        two[side] = two[side].with_(source="teacher")
        taught[place] = replace(taught[place], sequences=tuple(two))
    found = weights(taught, pair_weights="source", source_weights={"teacher": 0.5, "replay": 0.25})
    assert found == pytest.approx([w * 4 / 1.875 for w in (1.0, 0.5, 0.25, 0.125)])
    assert weights(taught, pair_weights="source", source_weights={"greedy": 3.0}) == [1.0] * 4, "nobody wrote those"
    assert weights(taught, pair_weights="source", source_weights={"policy": 0.0}) == [0.0] * 4
    third = replace(taught[0], sequences=(*taught[0].sequences, taught[1].sequences[0]), nll=2)
    assert by_source([third], {"teacher": 0.5}) == [1.0], "what is imitated beside a pair is not compared"
    assert Dpo(pair_weights="source", source_weights={"teacher": 0.5}).loss_at_reference is None


# Win rates of 5/6, 1/2 and 1/6.
RANKED = ((0.5, 1.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.0, 0.5))
# (2^(5/6) - 2^(1/6)) (1 / ln 2 - 1 / ln 4), (2^(5/6) - 2^(1/2)) (1 / ln 2 - 1 / ln 3), (2^(1/2) - 2^(1/6)) (1 / ln 3 - 1 / ln 4)
SWAPS = {(0, 2): 0.4756093, (0, 1): 0.1957235, (1, 2): 0.0551097}


def test_pairs_count_what_swapping_the_two_changes_in_the_dcg_of_the_group():
    group = judged([1, 2, 3], preferences=RANKED)
    items, _ = Dpo(pair_weights="dcg").items(group, [Pair(chosen=won, rejected=lost, prob=1.0) for won, lost in SWAPS])
    assert [item.weight for item in items] == pytest.approx(list(SWAPS.values()), rel=1e-5)
    found = [item.weight for item in Dpo(pair_weights="dcg").prepare(items)]
    assert found == pytest.approx([w / (sum(SWAPS.values()) / 3) for w in SWAPS.values()], rel=1e-5)
    assert Dpo(pair_weights="dcg").needs.preferences


def test_the_dcg_does_not_depend_on_the_order_of_responses_and_ties_count_nothing():
    order = (2, 0, 1)
    moved = tuple(tuple(RANKED[i][j] for j in order) for i in order)
    for (won, lost), weight in SWAPS.items():
        (item,), _ = Dpo(pair_weights="dcg").items(
            judged([1, 2, 3], preferences=moved), [Pair(chosen=order.index(won), rejected=order.index(lost), prob=1.0)]
        )
        assert item.weight == pytest.approx(weight, rel=1e-5)
    even = ((0.5, 0.5, 1.0), (0.5, 0.5, 1.0), (0.0, 0.0, 0.5))  # win rates of 2/3, 2/3 and 1/6, ranks 1, 1 and 3
    pairs = [Pair(chosen=0, rejected=1, prob=0.5), Pair(chosen=0, rejected=2, prob=1.0), Pair(chosen=1, rejected=2, prob=1.0)]
    items, _ = Dpo(pair_weights="dcg").items(judged([1, 2, 3], preferences=even), pairs)
    expected = (2 ** (2 / 3) - 2 ** (1 / 6)) * (1 / math.log(2) - 1 / math.log(4))
    assert [item.weight for item in items] == pytest.approx([0.0, expected, expected])


def test_a_response_that_nobody_judged_has_no_rank():
    nan = float("nan")
    with_unjudged = ((0.5, 1.0, nan), (0.0, 0.5, nan), (nan, nan, 0.5))
    (one,), _ = Dpo(pair_weights="dcg").items(
        judged([1, 2, 3], preferences=with_unjudged), [Pair(chosen=0, rejected=1, prob=1.0)]
    )
    (other,), _ = Dpo(pair_weights="dcg").items(
        judged([1, 2], preferences=((0.5, 1.0), (0.0, 0.5))), [Pair(chosen=0, rejected=1, prob=1.0)]
    )
    assert one.weight == other.weight > 0


def test_weights_are_cut_off_and_have_mean_1_again():
    items = [with_gap(gap) for gap in (3.0, 1.0, 0.0)]
    assert weights(items, pair_weights="score_gap") == pytest.approx([2.25, 0.75, 0.0])
    # 1.5, 0.75 and 0.5 over their mean, 0.916667
    cut = weights(items, pair_weights="score_gap", pair_weight_clip=[0.5, 1.5])
    assert cut == pytest.approx([18 / 11, 9 / 11, 6 / 11])
    assert weights(items, pair_weights="score_gap", pair_weight_clip=[0.0, 3.0]) == pytest.approx([2.25, 0.75, 0.0])
    assert normalized([0.0, 0.0]) == [0.0, 0.0]
    assert normalized([0.0, 0.0], [0.1, 5.0]) == [1.0, 1.0], "pairs that all count nothing are alike"
    assert normalized([]) == []


def counted(items, kind, unit, clip=None) -> list[float]:
    return [item.weight for item in weighed(items, kind, clip, unit)]


def won(rate: float, length: int = 2, **changes):
    return replace(single(sequence(length, win_rate=rate)), **changes)


def test_single_responses_count_by_how_far_they_are_from_winning_half():
    """abs(2 w - 1) = 0.8, 0.4 and 0, whose mean is 0.4; over tokens, of which there are 1, 2 and 5, it is 0.2."""
    items = [won(0.9, 1), won(0.3, 2), won(0.5, 5)]
    assert counted(items, "certainty", "sequence") == pytest.approx([2.0, 1.0, 0.0])
    assert counted(items, "certainty", "token") == pytest.approx([4.0, 2.0, 0.0])
    assert counted(items, "certainty", "sequence", [0.5, 1.5]) == pytest.approx([1.5, 1.0, 0.5])


def test_lists_count_by_the_gap_between_best_and_worst():
    lists = [
        replace(with_gap(0), sequences=tuple(sequence(2, score=s, win_rate=w) for s, w in zip(scores, rates, strict=True)))
        for scores, rates in (((3.0, 1.0, 0.0), (0.8, 0.5, 0.2)), ((0.0, 1.0), (0.4, 0.6)))
    ]
    assert counted(lists, "score_gap", "list") == pytest.approx([1.5, 0.5])
    assert counted(lists, "certainty", "list") == pytest.approx([1.5, 0.5])


def test_responses_to_one_prompt_count_as_much_as_those_to_another():
    items = [won(0.9, prompt_id=prompt) for prompt in "ppq"]
    assert counted(items, "per_prompt", "sequence") == pytest.approx([0.75, 0.75, 1.5])


def test_older_responses_count_less():
    items = [won(0.9, 1, iteration=3), won(0.9, 2, iteration=2), won(0.9, 5, iteration=2)]
    assert counted(items, "age", "sequence") == pytest.approx([1.5, 0.75, 0.75])
    assert counted(items, "age", "token") == pytest.approx([8 / 4.5, 4 / 4.5, 4 / 4.5])
    assert [item.weight for item in weighed(items, "age", None, "sequence", 0.25)] == pytest.approx([2.0, 0.5, 0.5])


def test_equal_weights_change_nothing_and_others_multiply_what_an_item_counts():
    items = [won(0.9, prompt_id=prompt, weight=weight) for prompt, weight in (("p", 1.0), ("q", 0.25))]
    assert list(weighed(items, "per_prompt", None, "sequence")) == items
    assert counted([won(0.5), won(0.5)], "certainty", "sequence") == [0.0, 0.0]


# Beside the pair an answer of three tokens, 0.7 nats each.
ANSWERED = pair(*ITEM.sequences, sequence(3, 90), nll=2)
ANSWER_ROWS = (*ROWS, -0.7)
GOLD = {"nll_coef": 2.0, "nll_target": "reference_answer"}


@pytest.mark.parametrize(("norm", "nats"), [("per_token", 0.7), ("sum", 2.1)])
def test_the_stored_answer_is_imitated_whoever_won(norm, nats):
    loss, gradient, out, batch = evaluate(Dpo(**GOLD, nll_norm=norm), [ANSWERED], ANSWER_ROWS)
    assert loss == pytest.approx(F_PLUS + 2.0 * nats, rel=1e-6)
    assert values(out)["answer_nll"] == pytest.approx(0.7)
    assert "chosen_nll" not in values(out)
    assert torch.equal(gradient[:2], evaluate(Dpo(), [ITEM], ROWS)[1]), "nothing of it on the pair"
    per_token = -2.0 / 3 if norm == "per_token" else -2.0
    assert gradient[2, :3].tolist() == pytest.approx([per_token] * 3)
    assert (batch.pairs_P2.tolist(), batch.nll_P.tolist(), ANSWERED.count("pair")) == ([[0, 1]], [2], 1)


@pytest.mark.parametrize(("knobs", "nats"), [({}, 4.0 / 6), ({"nll_target": "reference_answer"}, (2.1 + 0.7) / 4)])
def test_the_mean_over_the_tokens_of_all_targets_by_hand(knobs, nats):
    """Chosen: 4 tokens with 0.5 nats and 2 with 1. Answers: 3 tokens with 0.7 nats and one."""
    short = pair(ITEM.sequences[1], ITEM.sequences[0], sequence(1, 90), nll=2)
    algorithm = Dpo(nll_coef=2.0, nll_norm="batch_tokens", **knobs)
    rows = [*ANSWER_ROWS, -1.0, -0.5, -0.7]
    items = [replace(item, **({} if knobs else {"nll": 0})) for item in (ANSWERED, short)]
    made = list(algorithm.prepare(items))
    loss, gradient, _, _ = evaluate(algorithm, made, rows)
    plain = evaluate(Dpo(), items, rows)
    assert loss - plain[0] == pytest.approx(2.0 * nats, rel=1e-6)
    # Every token of every target has the same slope: 2 over their number.
    target = slice(2, 6, 3) if knobs else slice(0, 6, 3)
    more = (gradient - plain[1])[target].flatten()
    assert more[more != 0].tolist() == pytest.approx([-2.0 / (4 if knobs else 6)] * (4 if knobs else 6))
    weighed = Dpo(nll_coef=2.0, nll_norm="batch_tokens", pair_weights="per_prompt").prepare(items)
    assert [(item.weight, item.nll_tokens) for item in weighed] == [(1.0, made[0].nll_tokens)] * 2
    assert Dpo(nll_norm="batch_tokens").prepare(items) is items, "without a likelihood nothing is asked for"


def test_its_likelihood_is_weighed_as_its_pair():
    halved = replace(ANSWERED, weight=0.5)
    assert evaluate(Dpo(**GOLD), [halved], ANSWER_ROWS)[0] == pytest.approx(0.5 * (F_PLUS + 1.4), rel=1e-6)


def test_the_answer_is_a_third_sequence_unless_it_is_one_of_the_pair():
    group = judged([2, 3], scores=(1.0, 0.0))
    pairs = [Pair(chosen=0, rejected=1, prob=0.7)]
    (item,), dropped = Dpo(**GOLD).items(group, pairs)
    third = item.sequences[2]
    assert (item.nll, third.response_ids, third.prompt_ids, third.policy_version) == (2, (90, 91, 0), (1, 2), None)
    assert (item.is_pair, [*item.compared][:2], dropped) == (True, list(item.sequences[:2]), {})
    twin = replace(group.group.rollouts[1], token_ids=(90, 91, 0), logprobs=(-1.0,) * 3)
    same = replace(group, group=replace(group.group, rollouts=(group.group.rollouts[0], twin)))
    (item,), _ = Dpo(**GOLD).items(same, pairs)
    assert (item.nll, len(item.sequences)) == (1, 2)
    bare = replace(group, group=replace(group.group, prompt=replace(group.group.prompt, answer_ids=())))
    with pytest.raises(ValueError, match="carries no answer_ids"):
        Dpo(**GOLD).items(bare, pairs)
    assert (Dpo(**GOLD).needs.answers, Dpo(nll_coef=2.0).needs.answers) == (True, False)


def test_beside_samples_for_a_kl_and_a_response_to_explore():
    group = judged([4, 2, 1, 3], {3: "greedy"}, scores=(3.0, 2.0, 0.0, 1.0))
    (item,), _ = Selm(**GOLD, online_kl=0.1, online_kl_samples=3).items(group, [Pair(chosen=0, rejected=2, prob=0.9)])
    assert [s.response_ids[0] for s in item.sequences] == [10, 30, 90, 20, 40]
    assert (item.nll, item.online, item.exploration) == (2, (0, 3, 1), 4)
    batch = collate([item])
    assert (batch.nll_P.tolist(), batch.online_PN.tolist(), batch.exploration_P.tolist()) == ([2], [[0, 3, 1]], [4])


def test_a_batch_without_it_is_refused():
    with pytest.raises(ValueError, match="nll_P"):
        evaluate(Dpo(**GOLD), [ITEM], ROWS)


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_loss_on_pairs_may_imitate_the_answer(name):
    algorithm = ALL[name](**GOLD)
    assert algorithm.needs == replace(ALL[name](nll_coef=2.0).needs, answers=True)
    assert algorithm.loss_at_reference is None


# The two have 8 in common: 0.5 nats for each chosen token, -0.5 for each rejected one.
SPELLED = pair(
    replace(ITEM.sequences[0], response_ids=(7, 8, 20, 9)), replace(ITEM.sequences[1], response_ids=(8, 30)), prob=0.8
)


@pytest.mark.parametrize(
    ("knobs", "z"),
    [
        ({}, 0.1 * (0.5 * 3 + 0.5)),
        ({"common_token_weight": 0.25}, 0.1 * (0.5 * 3.25 + 0.5 * 1.25)),
        ({"common_token_weight": 1.0}, 0.3),
        ({"common_token_weight": 0.25, "length_norm": True}, 0.1 * (0.5 * 3.25 / 4 + 0.5 * 1.25 / 2)),  # lengths stay
        ({"reference_free": True}, 0.1 * (-0.5 * 3 + 2.5)),
        # The last two chosen tokens are beyond the shorter response.
        ({"common_token_weight": 0.5, "ld_alpha": 0.5}, 0.1 * (0.5 * (1 + 0.5 + 0.5 + 0.5) + 0.5 * 1.5)),
    ],
)
def test_what_both_responses_say_counts_less(knobs, z):
    algorithm = Dpo(token_weights="differing", **knobs)
    items = list(algorithm.prepare([SPELLED]))
    loss, gradient, _, _ = evaluate(algorithm, items, ROWS)
    assert loss == pytest.approx(math.log1p(math.exp(-z)), rel=1e-6)
    common = knobs.get("common_token_weight", 0.0)
    assert gradient[0, 1].item() == pytest.approx(common * gradient[0, 0].item())
    assert gradient[1, 0].item() == pytest.approx(common * gradient[1, 1].item())


def test_equal_weights_are_the_loss_itself_to_the_bit():
    plain = evaluate(Dpo(), [SPELLED], ROWS)
    even = Dpo(token_weights="differing", common_token_weight=1.0)
    weighed = evaluate(even, list(even.prepare([SPELLED])), ROWS)
    assert plain[0] == weighed[0]
    assert torch.equal(plain[1], weighed[1])


def test_the_likelihood_of_the_chosen_response_is_that_of_all_its_tokens():
    algorithm = Dpo(token_weights="differing", nll_coef=2.0)
    loss = evaluate(algorithm, list(algorithm.prepare([SPELLED])), ROWS)[0]
    assert loss == pytest.approx(math.log1p(math.exp(-0.2)) + 2.0 * 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "ours", "theirs"),
    [
        ((1, 2, 3, 4), (1, 2, 9, 4), [0, 0, 1, 0], [0, 0, 1, 0]),
        ((1, 2), (3, 4, 5), [1, 1], [1, 1, 1]),
        ((1, 2, 3), (1, 2, 3, 4), [0, 0, 0], [0, 0, 0, 1]),
        ((1, 2), (2, 1), [0, 1], [1, 0]),  # in the same order only
        ((), (1,), [], [1]),
    ],
)
def test_which_tokens_are_common(one, other, ours, theirs):
    found = apart(one, other, 0.0)
    assert [w.tolist() for w in found] == [ours, theirs]
    assert [w.dtype for w in found] == [np.float32, np.float32]
    assert apart(np.array(one, np.int32), np.array(other, np.int32), 0.0)[0].tolist() == ours


def test_what_else_an_item_holds_counts_whole():
    made = next(iter(Dpo(token_weights="differing", **GOLD).prepare([ANSWERED])))
    assert made.sequences[2].token_weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", MARGINS)
def test_every_loss_of_a_margin_reads_them(name):
    algorithm = ALL[name](token_weights="differing")
    with pytest.raises(ValueError, match="token_weights_BT"):
        algorithm.margins(*_batch(SPELLED))
    assert algorithm.margins(*_batch(next(iter(algorithm.prepare([SPELLED])))))


def _batch(item):
    from onlinerl.batch import Outputs

    batch = collate([item])
    return Outputs(logprobs_BT=torch.full(batch.mask_BT.shape, -1.0)), batch
