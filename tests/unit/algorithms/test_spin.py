from __future__ import annotations

import dataclasses
import math

import pytest
from algorithm_batches import F_PLUS, ITEM, ROWS, evaluate, items_of, judged, pair, sequence, values

from onlinerl.algorithms.dpo import Dpo
from onlinerl.algorithms.spin import Spin

VARIANTS = [{}, {"beta": 0.5, "nll_coef": 0.3}]
KNOBS = {"beta": [({}, 0.3)], "nll_coef": [({}, 0.5)]}
NAN = float("nan")


def at_reference(items):
    return math.log(2)


def test_value_by_hand():
    loss, gradient, _, _ = evaluate(Spin(), [ITEM], ROWS)  # z = 0.3
    assert loss == pytest.approx(F_PLUS)
    # beta (sigmoid(0.3) - 1) = 0.1 * -0.425557 on each token of the answer
    assert gradient[0].tolist() == pytest.approx([-0.0425557] * 4, abs=1e-7)
    assert gradient[1, :2].tolist() == pytest.approx([0.0425557] * 2, abs=1e-7)


def test_the_likelihood_of_the_answer_is_a_term():
    plain, with_nll = (evaluate(Spin(nll_coef=c), [ITEM], ROWS) for c in (0.0, 2.0))
    assert with_nll[0] - plain[0] == pytest.approx(2.0 * 0.5)
    assert (Spin().loss_at_reference, Spin(nll_coef=2.0).loss_at_reference) == (pytest.approx(math.log(2)), None)


def test_it_is_dpo_with_the_answer_as_the_chosen_response():
    ours, theirs = (evaluate(algorithm, [ITEM], ROWS) for algorithm in (Spin(beta=0.2), Dpo(beta=0.2)))
    assert ours[0] == theirs[0]
    assert ours[1].tolist() == theirs[1].tolist()


def test_the_answer_stands_against_every_judged_response():
    group = judged([2, 1, 3], scores=(0.5, -1.0, NAN))
    items, dropped = Spin().items(group, [])
    assert dropped == {"unjudged": 1}
    assert [item.sequences[0].response_ids for item in items] == [(90, 91, 0)] * 2
    assert [item.sequences[1].response_ids for item in items] == [(10, 11), (20,)]
    assert {item.sequences[0].prompt_ids for item in items} == {(1, 2)}
    answer, response = items[0].sequences
    assert (answer.policy_version, answer.behavior_logprobs) == (None, None)  # nobody sampled it
    assert (response.policy_version, response.score) == (3, 0.5)


def test_one_response_is_enough_and_what_the_oracle_says_is_not_read():
    def loss(**verdict):
        items = items_of(Spin(), judged([2, 1], **verdict))
        items = [pair(*(sequence(len(s.response_ids), score=s.score, win_rate=s.win_rate) for s in i.sequences)) for i in items]
        return evaluate(Spin(), items, [-0.5, 0.0, -0.5, -0.2])[0]

    assert loss(scores=(5.0, -5.0)) == loss(scores=(0.0, 0.0)) == loss(preferences=((NAN, 1.0), (0.0, NAN)))
    assert len(items_of(Spin(), judged([2], scores=(1.0,)))) == 1


def test_a_response_that_is_the_answer_is_left_out_and_would_teach_nothing():
    group = judged([2, 3], scores=(1.0, 0.0))
    same = dataclasses.replace(group.group.rollouts[1], token_ids=group.group.prompt.answer_ids)
    group = dataclasses.replace(group, group=dataclasses.replace(group.group, rollouts=(group.group.rollouts[0], same)))
    items, dropped = Spin().items(group, [])
    assert dropped == {"identical": 1}
    assert [item.sequences[1].response_ids for item in items] == [(10, 11)]
    twins = pair(sequence(3, reference_logprobs=-1.0), sequence(3, reference_logprobs=-1.0))
    loss, gradient, _, _ = evaluate(Spin(), [twins], [-0.7, -0.7])
    assert loss == pytest.approx(math.log(2))
    assert gradient.sum(dim=0).abs().max() == 0  # the two rows are one and the same text


def test_a_prompt_without_an_answer_is_refused():
    group = judged([2], scores=(1.0,))
    prompt = dataclasses.replace(group.group.prompt, answer_ids=())
    with pytest.raises(ValueError, match="'p' carries no answer_ids"):
        Spin().items(dataclasses.replace(group, group=dataclasses.replace(group.group, prompt=prompt)), [])


def test_metrics_are_those_of_a_pair():
    metrics = values(evaluate(Spin(), [ITEM], ROWS)[2])
    assert (metrics["z"], metrics["margin"], metrics["accuracy"]) == (pytest.approx(0.3), pytest.approx(3.0), 1.0)
