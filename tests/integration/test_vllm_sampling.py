"""What one real vLLM engine on CPU samples: log-probs, seeds, long prompts, a small cache, and answers that cannot be used."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from engine import BLOCK_GIB, CLOSE, KV_BLOCKS, PROMPT, Replica, Sender, plain, state_of
from transformers import LlamaForCausalLM

from onlinerl.errors import ConfigError
from onlinerl.types import Group, Prompt, Request, Sampling

pytestmark = pytest.mark.engine


# --- sampling ---


def test_behavior_logprobs_are_those_of_teacher_forcing(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    sender.push(state_of(base), 1)

    rollout = replica.sample(PROMPT, [7]).rollouts[0]

    assert len(rollout.logprobs) == len(rollout.token_ids)
    np.testing.assert_allclose(rollout.logprobs, replica.call("logprobs", PROMPT, rollout.token_ids), atol=CLOSE)
    np.testing.assert_allclose(rollout.logprobs, plain(base, PROMPT, rollout.token_ids), atol=CLOSE)
    assert rollout.policy_version == 1


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_behavior_logprobs_are_at_the_sampling_temperature(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, temperature: float
) -> None:
    sender.push(state_of(base), 1)

    rollout = replica.sample(PROMPT, [3], temperature=temperature).rollouts[0]

    np.testing.assert_allclose(rollout.logprobs, plain(base, PROMPT, rollout.token_ids, temperature), atol=CLOSE)


def processed(model: LlamaForCausalLM, prompt: Sequence[int], response: Sequence[int], sampling: Sampling) -> np.ndarray:
    """Log-probs of the response where temperature, then top-k, then top-p have been applied, one token after the other."""
    found = []
    for i, token in enumerate(response):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *response[:i]]])).logits[0, -1].float() / sampling.temperature
        kept, order = logits.topk(sampling.top_k)
        mass = torch.softmax(kept, dim=-1).cumsum(dim=-1)
        nucleus = int((mass < sampling.top_p).sum()) + 1
        assert token in order[:nucleus].tolist(), "a token outside of what may be sampled"
        found.append(float(torch.log_softmax(kept[:nucleus], dim=-1)[order.tolist().index(token)]))
    return np.array(found)


def test_behavior_logprobs_are_those_of_the_truncated_distribution(
    replica: Replica, sender: Sender, base: LlamaForCausalLM
) -> None:
    sender.push(state_of(base), 1)
    sampling = Sampling(temperature=0.7, top_k=8, top_p=0.6, max_new_tokens=12)

    for rollout in replica.sample(PROMPT, range(6), temperature=0.7, top_k=8, top_p=0.6).rollouts:
        assert rollout.sampler == sampling
        np.testing.assert_allclose(rollout.logprobs, processed(base, PROMPT, rollout.token_ids, sampling), atol=CLOSE)
        assert np.abs(np.array(rollout.logprobs) - plain(base, PROMPT, rollout.token_ids)).max() > 100 * CLOSE


def test_seeds_decide_what_is_sampled(replica: Replica) -> None:
    first = [r.token_ids for r in replica.sample(PROMPT, range(6)).rollouts]
    second = [r.token_ids for r in replica.sample(PROMPT, range(6)).rollouts]

    assert first == second
    assert len(set(first)) == 6


def test_a_response_goes_on_after_the_tokens_that_it_was_made_to_begin_with(
    replica: Replica, sender: Sender, base: LlamaForCausalLM
) -> None:
    """Only what was sampled has log-probs, given all before it; the text is that of the whole response."""
    sender.push(state_of(base), 1)
    prefix = (9, 10, 11)
    request = Request(prompt=Prompt(id="p", text="", token_ids=tuple(PROMPT)), seeds=(1, 2), prefix_ids=prefix)

    group = replica.call("generate", request, Sampling(max_new_tokens=12))

    longer = replica.sample([*PROMPT, *prefix], [1, 2], max_new_tokens=9)
    assert [r.token_ids for r in group.rollouts] == [r.token_ids for r in longer.rollouts]
    start = replica.replica._engine.get_tokenizer().decode(prefix)
    for rollout in group.rollouts:
        assert rollout.prefix_ids == prefix
        assert (rollout.sampler.max_new_tokens, rollout.policy_version) == (9, 1)
        np.testing.assert_allclose(rollout.logprobs, plain(base, [*PROMPT, *prefix], rollout.token_ids), atol=CLOSE)
        assert rollout.text.strip().startswith(start.strip())
        assert len(rollout.text.split()) > 3


def test_finish_reasons(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    state = state_of(base)
    sender.push(state, 1)
    lengths = [r for r in replica.sample(PROMPT, range(4), max_new_tokens=3).rollouts if r.finish_reason == "length"]
    assert lengths
    assert all(len(r.token_ids) == 3 and 2 not in r.token_ids for r in lengths)

    state["model.embed_tokens.weight"][2] = 0.0
    state["model.norm.weight"] *= 0  # all logits equal: the end comes up once in 160 tokens
    sender.push(state, 2)

    rollouts = replica.sample(PROMPT, range(16), max_new_tokens=200).rollouts
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert stopped
    for r in stopped:  # the end token is part of what was generated, and of what has a log-prob
        assert r.token_ids[-1] == 2
        assert 2 not in r.token_ids[:-1]
        assert len(r.logprobs) == len(r.token_ids)


# --- many and long prompts: a prompt that is split over steps ends the engine on CPU ---


def group_of(replica: Replica, prompts: Sequence[Sequence[int]], samples: int, **sampling: Any) -> list[Group]:
    """`samples` responses to each prompt, all asked for at once."""
    requests = [
        Request(prompt=Prompt(id=str(i), text="", token_ids=tuple(p)), seeds=tuple(range(100 * i, 100 * i + samples)))
        for i, p in enumerate(prompts)
    ]

    async def everything() -> list[Group]:
        return await asyncio.gather(*(replica.replica.generate(request, Sampling(**sampling)) for request in requests))

    return replica.wait(everything())


def check_groups(replica: Replica, base: LlamaForCausalLM, groups: list[Group], samples: int, **sampling: Any) -> None:
    """Every response is there under its seed, with the model's log-probs, and is the same when asked for alone."""
    for i, group in enumerate(groups):
        assert [r.seed for r in group.rollouts] == list(range(100 * i, 100 * i + samples))
        assert group.rejected == ()
        prompt = group.prompt.token_ids
        for rollout in group.rollouts[:2]:
            np.testing.assert_allclose(rollout.logprobs, plain(base, prompt, rollout.token_ids), atol=CLOSE)
        (alone,) = replica.sample(prompt, [group.rollouts[-1].seed], **sampling).rollouts
        assert alone.token_ids == group.rollouts[-1].token_ids


def random_prompts(count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(length).integers(4, 150, (count, length)).tolist()


def test_prefills_beyond_the_budget_of_a_step(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    """16 prompts of 230 tokens are more than the 2,048 tokens of a step, also where the two samples of one share a cached block."""
    sender.push(state_of(base), 1)

    groups = group_of(replica, random_prompts(24, 230), samples=2, max_new_tokens=6)

    check_groups(replica, base, groups, samples=2, max_new_tokens=6)


def test_sequences_that_are_put_off_for_lack_of_cache_go_on_as_they_were(
    replica: Replica, sender: Sender, base: LlamaForCausalLM
) -> None:
    """Each outgrows its first block of the cache: some must give theirs up and be computed again, from the next random number on."""
    sender.push(state_of(base), 1)
    before = replica.watched.preemptions

    groups = group_of(replica, random_prompts(4, 118), samples=8, max_new_tokens=24)

    assert replica.watched.preemptions > before
    check_groups(replica, base, groups, samples=8, max_new_tokens=24)


def test_sequences_as_long_as_the_engine_takes(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    sender.push(state_of(base), 1)

    groups = group_of(replica, random_prompts(3, 256 - 12), samples=8, max_new_tokens=12)

    assert max(len(r.token_ids) for g in groups for r in g.rollouts) == 12
    check_groups(replica, base, groups, samples=8, max_new_tokens=12)


def test_five_hundred_prompts_at_once(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    sender.push(state_of(base), 1)
    replica.watched.most_running = 0

    groups = group_of(replica, random_prompts(500, 12), samples=8, max_new_tokens=2)

    assert [len(group.rollouts) for group in groups] == [8] * 500
    assert 8 < replica.watched.most_running <= 16, "engine.max_num_seqs, seen after what finished in a step has left"
    check_groups(replica, base, groups[:3], samples=8, max_new_tokens=2)


def test_vllm_knows_every_variable_that_is_set_for_it() -> None:
    from vllm import envs

    from onlinerl.engines.vllm import VLLM

    assert {name for name in VLLM().environment() if name.startswith("VLLM_")} <= set(envs.environment_variables)


def test_the_cache_has_the_size_that_was_asked_for(replica: Replica) -> None:
    assert replica.replica._engine.vllm_config.cache_config.num_gpu_blocks == KV_BLOCKS


def test_a_cache_too_small_for_one_sequence_is_refused_before_anything_starts(tiny_llama: Path) -> None:
    """256 tokens are two blocks, and vLLM keeps one for itself."""
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_gib: .* one sequence of 256 tokens needs"):
        Replica(tiny_llama, kv_cache_gib=2.9 * BLOCK_GIB)


# --- answers that cannot be used ---


def altered(replica: Replica, change: Callable[[int, Any], None]) -> Any:
    """While this is in force, `change(n, completion)` alters the n-th answer of vLLM."""
    engine = replica.replica._engine
    usual, answers = engine.generate, count()

    async def generate(*args: Any, **more: Any) -> Any:
        async for output in usual(*args, **more):
            change(next(answers), output.outputs[0])
            yield output

    return mock.patch.object(engine, "generate", generate)


@pytest.mark.parametrize("value", [math.nan, -math.inf, None])
def test_a_response_without_usable_logprobs_is_rejected_and_the_others_stay(replica: Replica, value: float | None) -> None:
    usual = replica.sample(PROMPT, [1, 2, 3])

    def change(n: int, completion: Any) -> None:
        if n == 1:
            last = completion.token_ids[-1]
            completion.logprobs[-1] = {} if value is None else {last: SimpleNamespace(logprob=value)}

    with altered(replica, change):
        group = replica.sample(PROMPT, [1, 2, 3])

    assert group.rejected == ("logprob",)
    assert len(group.rollouts) == 2
    assert set(group.rollouts) < set(usual.rollouts)


def test_an_aborted_response_is_asked_for_again_with_its_seed(replica: Replica) -> None:
    usual = replica.sample(PROMPT, [1, 2], max_new_tokens=200)
    engine = replica.replica._engine
    aborted: list[str] = []

    async def generate(prompt: Any, params: Any, request_id: str) -> Any:
        if len(aborted) < 2:
            aborted.append(request_id)
            asyncio.get_running_loop().call_later(0.05, lambda: asyncio.ensure_future(engine.abort(request_id)))
        async for output in type(engine).generate(engine, prompt, params, request_id):
            reasons.append(output.outputs[0].finish_reason)
            yield output

    reasons: list[str] = []
    with mock.patch.object(engine, "generate", generate):
        group = replica.sample(PROMPT, [1, 2], max_new_tokens=200)

    assert reasons[:2] == ["abort", "abort"], "vLLM was made to abort"
    assert group == usual


def test_a_response_that_is_aborted_every_time_is_rejected(replica: Replica) -> None:
    asked: list[int] = []

    def change(n: int, completion: Any) -> None:
        asked.append(n)
        completion.finish_reason = "abort"

    with altered(replica, change):
        group = replica.sample(PROMPT, [1])

    assert group.rollouts == ()
    assert group.rejected == ("abort",)
    assert len(asked) == 3
