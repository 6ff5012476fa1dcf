"""How one sample at a time becomes the responses to a prompt: what is asked again, what is thrown away, and in which order they are."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onlinerl.engines._responses import ATTEMPTS, Answer, generate
from onlinerl.types import Group, Prompt, Request, Sampling

PROMPT = Prompt(id="p", text="", token_ids=(5, 6))
SAMPLING = Sampling(temperature=0.7, max_new_tokens=3)
GREEDY = Sampling(temperature=0.0, max_new_tokens=3)
ABORTED = {"finish_reason": "abort", "token_ids": [1], "logprobs": [-0.5], "text": "half"}


class Engine:
    """Gives the answers to each seed one after the other, those to later seeds first."""

    def __init__(self, answers: dict[int, list[dict[str, Any]]]) -> None:
        self._answers: dict[int, Iterator[dict[str, Any]]] = {seed: iter(each) for seed, each in answers.items()}
        self.asked: Counter[int] = Counter()
        self.finished: list[int] = []

    async def ask(self, request: Request, sampling: Sampling, seed: int) -> Answer:
        greedy = request.greedy and seed == request.seeds[-1]
        assert (request.prompt, sampling) == (PROMPT, GREEDY if greedy else SAMPLING)
        self.asked[seed] += 1
        for _ in range(100 - seed):
            await asyncio.sleep(0)
        self.finished.append(seed)
        usual: dict[str, Any] = {"token_ids": [seed, 0], "logprobs": [-0.5, -0.25], "text": str(seed), "finish_reason": "stop"}
        return Answer(**{"policy_version": 4, **usual, **next(self._answers[seed])})

    def group(self, *, greedy: bool = False) -> Group:
        request = Request(prompt=PROMPT, seeds=tuple(self._answers), greedy=greedy)
        return asyncio.run(generate(request, SAMPLING, self.ask))


def test_all_seeds_are_asked_for_at_once_and_the_responses_are_in_their_order() -> None:
    engine = Engine({seed: [{}] for seed in (11, 12, 13, 14)})
    group = engine.group()
    assert engine.finished == [14, 13, 12, 11]
    assert [(r.seed, r.text, r.token_ids) for r in group.rollouts] == [(s, str(s), (s, 0)) for s in (11, 12, 13, 14)]
    assert (group.prompt, group.rejected) == (PROMPT, ())
    first = group.rollouts[0]
    assert (first.logprobs, first.finish_reason, first.policy_version, first.sampler) == ((-0.5, -0.25), "stop", 4, SAMPLING)


def test_an_aborted_response_is_asked_for_again_with_its_seed() -> None:
    engine = Engine({11: [{}], 12: [ABORTED, ABORTED, {"finish_reason": "length", "policy_version": 5}]})
    group = engine.group()
    assert engine.asked == {11: 1, 12: 3}
    assert [(r.seed, r.text, r.finish_reason, r.policy_version) for r in group.rollouts] == [
        (11, "11", "stop", 4),
        (12, "12", "length", 5),
    ]
    assert group.rejected == ()


def test_the_last_response_may_be_the_greedy_one() -> None:
    group = Engine({seed: [{}] for seed in (11, 12, 13)}).group(greedy=True)
    assert [(r.seed, r.source, r.sampler) for r in group.rollouts] == [
        (11, "policy", SAMPLING),
        (12, "policy", SAMPLING),
        (13, "greedy", GREEDY),
    ]
    narrow = Sampling(temperature=0.7, top_p=0.5, top_k=3, max_new_tokens=3)
    assert narrow.greedy() == GREEDY, "the whole vocabulary"


def test_one_that_is_aborted_every_time_is_given_up_and_the_others_stay() -> None:
    engine = Engine({11: [{}], 12: [ABORTED] * 9, 13: [{}]})
    group = engine.group()
    assert engine.asked == {11: 1, 12: ATTEMPTS, 13: 1}
    assert [r.seed for r in group.rollouts] == [11, 13]
    assert group.rejected == ("abort",)


@pytest.mark.parametrize("logprobs", [[-0.5], [], [-0.5] * 3, [-0.5, None], [math.nan, -0.5], [-0.5, -math.inf], [-0.5, "-1"]])
def test_one_without_a_usable_log_prob_of_each_token_is_thrown_away_at_once(logprobs: list[Any]) -> None:
    engine = Engine({11: [{"logprobs": logprobs}, {}], 12: [{}]})
    group = engine.group()
    assert engine.asked == {11: 1, 12: 1}, "the same seed would give the same again"
    assert [r.seed for r in group.rollouts] == [12]
    assert group.rejected == ("logprob",)


def test_half_a_response_is_asked_for_again_whatever_its_log_probs() -> None:
    engine = Engine({11: [{**ABORTED, "logprobs": []}, {}]})
    assert [r.seed for r in engine.group().rollouts] == [11]


def test_a_log_prob_may_be_any_kind_of_number() -> None:
    group = Engine({11: [{"logprobs": [np.float32(-0.5), 0]}], 12: [{"token_ids": [], "logprobs": []}]}).group()
    assert [r.logprobs for r in group.rollouts] == [(-0.5, 0), ()]


def test_reasons_are_in_the_order_of_the_seeds() -> None:
    nothing = {"logprobs": [None, None]}
    assert Engine({11: [nothing], 12: [ABORTED] * ATTEMPTS, 13: [nothing]}).group().rejected == ("logprob", "abort", "logprob")


def test_an_engine_that_fails_is_no_rejected_response() -> None:
    async def fails(request: Request, sampling: Sampling, seed: int) -> Answer:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        asyncio.run(generate(Request(prompt=PROMPT, seeds=(11,)), SAMPLING, fails))
