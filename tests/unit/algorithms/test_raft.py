from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from algorithm_batches import evaluate, finite_differences, judged, place, response_gradients, sequence, single, trained, values
from pydantic import ValidationError

from onlinerl.algorithms.raft import Raft
from onlinerl.algorithms.reinforce_scalar import ReinforceScalar

VARIANTS = [{}, {"keep": None, "threshold": 0.0, "per_sequence": False}, {"real_data_frac": 0.5}]
KNOBS = {
    "keep": [({}, 2), ({}, None)],
    "threshold": [({}, 0.5)],
    "per_sequence": [({}, False)],
    "real_data_frac": [({}, 0.5), ({"real_data_frac": 0.5}, 0.25)],
}
LOGPROBS = [[-1.0, -0.5, -2.0], [-0.3], [-1.5, -0.2]]


def at_reference(items):
    return -np.mean([item.sequences[0].behavior_logprobs.mean() for item in items])


def kept(algorithm: Raft, group) -> tuple[list[int], dict[str, int]]:
    items, dropped = algorithm.items(group, [])
    return [place(item.sequences[0]) for item in items], dict(dropped)


def test_value_by_hand():
    items = [single(sequence(2)), single(sequence(1, 50))]
    loss, gradient, out, _ = evaluate(Raft(), items, [[-1.0, -3.0], [-0.5]])
    assert loss == pytest.approx((2.0 + 0.5) / 2)
    assert gradient.tolist() == [[-0.25, -0.25], [-0.5, 0.0]]
    assert evaluate(Raft(per_sequence=False), items, [[-1.0, -3.0], [-0.5]])[0] == pytest.approx(4.5 / 3)
    assert values(out) == pytest.approx({"nll": 1.5, "response_length": 1.5})


def test_what_is_kept_by_hand():
    group = judged([1, 2, 3, 1], scores=(0.0, 2.0, -1.0, 1.0))
    assert kept(Raft(), group) == ([1], {"not_kept": 3})
    assert kept(Raft(keep=2), group) == ([1, 3], {"not_kept": 2})
    assert kept(Raft(keep=None, threshold=0.0), group) == ([1, 3, 0], {"not_kept": 1})
    assert kept(Raft(keep=None), group) == ([1, 3, 0, 2], {})
    assert kept(Raft(threshold=3.0), group) == ([], {"not_kept": 4})
    assert kept(Raft(), judged([1, 2], scores=(1.0, 1.0))) == ([0], {"not_kept": 1}), "of equal ones the first"
    assert kept(Raft(), judged([1], scores=(1.0,))) == ([], {"single": 1})
    assert [Raft(keep=k).most_items(4, 0) for k in (1, 9, None)] == [1, 4, 4]


def test_the_same_response_is_kept_once():
    group = judged([1, 2, 1], scores=(1.0, 0.5, 0.9))
    twin = dataclasses.replace(group.group.rollouts[2], token_ids=group.group.rollouts[0].token_ids)
    group = dataclasses.replace(group, group=dataclasses.replace(group.group, rollouts=(*group.group.rollouts[:2], twin)))
    assert kept(Raft(keep=2), group) == ([0, 1], {"identical": 1})


def test_all_kept_is_supervised_learning_on_what_was_sampled():
    items = trained(Raft(keep=None), [judged([3, 1, 2], scores=(1.0, -0.5, 0.25))])
    got = response_gradients(Raft(keep=None), items, LOGPROBS)
    assert got == pytest.approx([-1 / 9] * 3 + [-1 / 3] + [-1 / 6] * 2)


def test_the_gradient_is_that_of_reinforce_that_rewards_the_best():
    """Up to the number of responses that the mean is over."""
    ours = trained(Raft(), [judged([3, 1, 2], scores=(1.0, -0.5, 0.25))])
    plain = ReinforceScalar(baseline="none", agg="seq_mean_token_mean")
    rows = {"old_logprobs": LOGPROBS, "behavior_logprobs": LOGPROBS}
    theirs = trained(plain, [judged([3, 1, 2], scores=(1.0, 0.0, 0.0))], **rows)
    expected = [3 * slope for slope in response_gradients(plain, theirs, LOGPROBS)]
    assert response_gradients(Raft(), ours, LOGPROBS) == pytest.approx(expected)


def test_best_of_k_has_the_kth_power_of_the_distribution():
    """Over all triples of 4 responses in the order of their rewards: P(best <= r) = F(r)^3."""
    chance, rewards = np.array([0.1, 0.4, 0.3, 0.2]), (0.0, 1.0, 2.0, 3.0)
    best = np.zeros(4)
    for triple in np.ndindex(4, 4, 4):
        (item,), _ = Raft().items(judged([1, 1, 1], scores=[rewards[i] for i in triple]), [])
        best[int(item.sequences[0].score)] += np.prod(chance[list(triple)])
    assert np.cumsum(best) == pytest.approx(np.cumsum(chance) ** 3)


# --- stored answers ---


def several(count: int, **knobs) -> tuple[Raft, list]:
    """Items of so many prompts, with two responses of which the first one is better."""
    algorithm, items = Raft(**knobs), []
    for number in range(count):
        one = judged([2, 1], scores=(1.0, 0.0))
        one = dataclasses.replace(
            one, group=dataclasses.replace(one.group, prompt=dataclasses.replace(one.group.prompt, id=f"p{number}"))
        )
        items += algorithm.items(one, [])[0]
    return algorithm, items


def stored(items) -> list[str]:
    return [item.prompt_id for item in items if item.sequences[0].source == "teacher"]


@pytest.mark.parametrize(("share", "answers"), [(0.5, 12), (0.25, 4), (0.2, 3), (0.05, 0), (0.1, 1)])
def test_stored_answers_are_the_share_of_what_is_trained_that_was_asked_for(share, answers):
    """12 prompts with one kept response each: f / (1 - f) of 12, rounded down."""
    algorithm, items = several(12, real_data_frac=share)
    places, dropped = algorithm.select(items)
    chosen = [items[place] for place in places]
    assert (len(stored(chosen)), len(chosen)) == (answers, 12 + answers)
    assert dropped == ({"real_data": 12 - answers} if answers < 12 else {})
    assert places == sorted(places)
    assert algorithm.figures(chosen) == {"real_data": pytest.approx(answers / (12 + answers))}
    answer = next(item.sequences[0] for item in items if item.sequences[0].source == "teacher")
    assert (answer.prompt_ids, answer.response_ids, answer.policy_version) == ((1, 2), (90, 91, 0), None)


def test_which_answers_are_trained_depends_on_iteration_and_prompts_only():
    algorithm, items = several(40, real_data_frac=0.2)

    def drawn(of) -> set[str]:
        return set(stored(of[place] for place in algorithm.select(of)[0]))

    later = [dataclasses.replace(item, iteration=7) for item in items]
    assert drawn(items) == drawn(list(reversed(items)))
    assert drawn(items) != drawn(later)
    assert len(drawn(items)) == len(drawn(later)) == 10


def test_by_hand_a_stored_answer_counts_like_a_kept_response():
    algorithm, items = several(1, real_data_frac=0.5)
    loss, gradient, _, _ = evaluate(algorithm, items, [[-1.0, -3.0], [-0.5, -0.5, -2.0]])
    assert loss == pytest.approx((2.0 + 1.0) / 2)
    assert gradient[1].tolist() == pytest.approx([-1 / 6] * 3)


def test_without_a_share_there_are_none_and_nobody_asks_for_any():
    assert Raft().needs.answers is False
    assert Raft(real_data_frac=0.1).needs.answers is True
    algorithm, items = several(3)
    assert stored(items) == []
    assert algorithm.select(items) == ([0, 1, 2], {})
    assert algorithm.figures(items) == {}
    assert [Raft(keep=k, real_data_frac=0.1).most_items(4, 0) for k in (1, 3, None)] == [2, 4, 5]


def test_an_answer_that_was_sampled_is_not_trained_twice_and_none_goes_without_a_kept_response():
    group = judged([2, 3], scores=(1.0, 0.0))
    said = dataclasses.replace(group.group.rollouts[0], token_ids=group.group.prompt.answer_ids, logprobs=(-1.0,) * 3)
    same = dataclasses.replace(group, group=dataclasses.replace(group.group, rollouts=(said, group.group.rollouts[1])))
    assert stored(Raft(real_data_frac=0.5).items(same, [])[0]) == []
    assert Raft(real_data_frac=0.5, threshold=9.0).items(group, [])[0] == []


@pytest.mark.parametrize(("keep", "share"), [(1, 0.51), (2, 0.34), (3, 0.3)])
def test_a_share_that_cannot_be_reached_is_refused(keep, share):
    with pytest.raises(ValidationError, match=r"at most|less than or equal to 0\.5"):
        Raft(keep=keep, real_data_frac=share)
    Raft(keep=keep, real_data_frac=1 / (keep + 1))


def test_gradient_by_finite_differences():
    items = [single(sequence(2), weight=2.0), single(sequence(1, 50), weight=0.5)]
    rows = [[-1.0, -3.0], [-0.5]]
    for algorithm in (Raft(), Raft(per_sequence=False)):
        _, gradient, _, _ = evaluate(algorithm, items, rows)
        assert torch.allclose(gradient, finite_differences(algorithm, items, rows), atol=1e-7)


def test_it_needs_neither_reference_nor_old_log_probs():
    needs = Raft().needs
    assert (needs.reference, needs.old_logprobs, needs.sampling_temperature, needs.off_policy) == (False, False, False, "valid")
