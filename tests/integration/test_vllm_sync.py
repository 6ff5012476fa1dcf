"""One real vLLM engine on CPU that is sent weights over gloo from this process, and the proofs that they arrived."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import CANARY, CLOSE, PROMPT, TIMEOUT_S, Replica, Sender, State, canary, plain, prove, state_of
from transformers import LlamaForCausalLM

from onlinerl.errors import EngineError, SyncError
from onlinerl.transports import _proof as proof

pytestmark = pytest.mark.engine


def greedy(model: LlamaForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return tokens[len(prompt) :]


# --- pushes that arrive ---


def test_pushing_what_the_engine_has_changes_nothing(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    sender.push(state_of(base), 1)
    held, answers, scores = replica.call("held"), replica.sample(PROMPT, range(4)), canary(replica)
    assert len(held[0]) > 8

    for version in (2, 3, 4):
        sender.push(state_of(base), version)
        prove(replica, base, version)
        assert replica.call("held") == held
        assert [r.token_ids for r in replica.sample(PROMPT, range(4)).rollouts] == [r.token_ids for r in answers.rollouts]
        for now, before in zip(canary(replica), scores, strict=True):
            np.testing.assert_array_equal(now, before)


def test_pushed_weights_are_computed_with(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM
) -> None:
    for version, model in enumerate((other, base, other), start=10):
        sender.push(state_of(model), version)
        prove(replica, model, version)
        for (prompt, response), scores in zip(CANARY, canary(replica), strict=True):
            np.testing.assert_allclose(scores, plain(model, prompt, response), atol=CLOSE)


def test_weights_from_disk_are_those_that_would_have_been_sent(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM, tmp_path: Path
) -> None:
    """What a replica is given that was down during a push; a push after it arrives as ever."""
    other.save_pretrained(tmp_path)
    sender.push(state_of(base), 16)
    sent = state_of(other)
    for version, dtype in ((17, "bfloat16"), (18, "float32")):
        replica.call("watch", list(sent))
        replica.call("load_weights", str(tmp_path), version, (dtype, "float32"))
        replica.call("reset_caches")
        rounded = {name: proof.digest(tensor.to(getattr(torch, dtype)).float()) for name, tensor in sent.items()}
        assert replica.call("received") == rounded
    prove(replica, other, 18)
    for (prompt, response), scores in zip(CANARY, canary(replica), strict=True):
        np.testing.assert_allclose(scores, plain(other, prompt, response), atol=CLOSE)
    assert {r.policy_version for r in replica.sample(PROMPT, range(2)).rollouts} == {18}
    with pytest.raises(EngineError, match="is not on the machine of this replica"):
        replica.call("load_weights", str(tmp_path / "elsewhere"), 19, ("float32", "float32"))

    sender.push(state_of(base), 20)
    prove(replica, base, 20)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.self_attn", "layers.1.mlp", "norm"])
def test_every_part_of_the_model_follows(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM, part: str
) -> None:
    """On CPU the engine computes with packed copies of its matrices, tied embeddings included: all must be made anew."""
    mixed = copy.deepcopy(base)
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if part in name:
                parameter.copy_(theirs[name])
    sender.push(state_of(base), 1)
    before = canary(replica)

    sender.push(state_of(mixed), 2)

    prove(replica, mixed, 2)
    for (prompt, response), scores, old in zip(CANARY, canary(replica), before, strict=True):
        np.testing.assert_allclose(scores, plain(mixed, prompt, response), atol=CLOSE)
        assert np.abs(scores - old).max() > 10 * CLOSE


def test_nothing_computed_with_older_weights_is_used(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM
) -> None:
    """With prefix caching, a repeated prompt must not be answered from the cache of older weights."""
    prompt = [int(t) for t in np.random.default_rng(1).integers(4, 150, 200)]  # longer than a block of the cache
    sender.push(state_of(base), 1)
    first = replica.sample(prompt, [0], temperature=0.0).rollouts[0]
    assert list(first.token_ids) == greedy(base, prompt, 12)

    sender.push(state_of(other), 2, reset=False)
    stale = replica.sample(prompt, [1], temperature=1.0).rollouts[0]
    gap = np.abs(np.array(stale.logprobs) - plain(other, prompt, stale.token_ids)).max()
    assert gap > 100 * CLOSE, "without a reset the cache is stale; if vLLM resets it now, this test shows nothing"

    replica.call("reset_caches")
    fresh = replica.sample(prompt, [0], temperature=0.0).rollouts[0]
    assert list(fresh.token_ids) == greedy(other, prompt, 12)
    again = replica.sample(prompt, [1], temperature=1.0).rollouts[0]
    np.testing.assert_allclose(again.logprobs, plain(other, prompt, again.token_ids), atol=CLOSE)


# --- pushes that do not ---


def zeros(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def permuted(state: State) -> State:
    a, b = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    return state | {a: state[b], b: state[a]}


def one_bit(state: State) -> State:
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = state[name].clone()
    tensor.view(torch.int32)[3, 5] ^= 1
    return state | {name: tensor}


@pytest.mark.parametrize("mutate", [zeros, permuted, one_bit])
def test_wrong_bytes_are_caught_by_checksums(
    replica: Replica, sender: Sender, other: LlamaForCausalLM, mutate: Callable[[State], State]
) -> None:
    state = state_of(other)

    sender.push(state, 20, sent=mutate(state))

    with pytest.raises(SyncError, match="replica 0"):
        prove(replica, other, 20)
    with pytest.raises(SyncError, match="replica 0"):
        prove(replica, other, 20, witness="checksums")


@pytest.mark.parametrize("mutate", [zeros, permuted])
def test_big_changes_are_caught_by_the_canary_alone(
    replica: Replica, sender: Sender, other: LlamaForCausalLM, mutate: Callable[[State], State]
) -> None:
    state = state_of(other)

    sender.push(state, 21, sent=mutate(state))

    with pytest.raises(SyncError, match="nats"):
        prove(replica, other, 21, witness="canary")


def test_a_push_that_never_happened_is_caught(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM
) -> None:
    sender.push(state_of(base), 30)

    replica.call("watch", list(state_of(other)))  # and no send

    for witness in ("all", "version", "checksums", "canary"):
        with pytest.raises(SyncError, match="replica 0"):
            prove(replica, other, 31, witness)


# --- failures ---


@pytest.mark.parametrize("fail_at", [0, 3, 9])
def test_after_a_failure_in_the_middle_a_complete_push_is_correct(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM, fail_at: int
) -> None:
    sender.push(state_of(base), 40)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the source broke"):
        sender.push(state_of(other), 41, fail_at=fail_at)
    assert replica.call("weight_version") == "40"

    sender.push(state_of(other), 42)

    prove(replica, other, 42)
    assert time.monotonic() - started < TIMEOUT_S, "the replica waited for its deadline"


def test_a_source_that_yields_something_else_is_refused(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    state = state_of(base)
    wrong = state | {"model.norm.weight": torch.ones(3)}

    with pytest.raises(ValueError, match="declared"):
        sender.push(state, 50, sent=wrong)

    sender.push(state, 51)
    prove(replica, base, 51)


def test_an_update_that_was_opened_and_left_does_not_block_the_next(
    replica: Replica, sender: Sender, base: LlamaForCausalLM
) -> None:
    sender.push(state_of(base), 60)
    replica.start_weight_update()

    sender.connect()
    sender.push(state_of(base), 61)

    prove(replica, base, 61)


def test_a_name_the_engine_does_not_know_fails_with_its_own_error(
    replica: Replica, sender: Sender, base: LlamaForCausalLM
) -> None:
    state = state_of(base)
    with pytest.raises(Exception, match=r"(?i)no_such"):
        sender.push({**state, "model.layers.0.no_such.weight": torch.ones(4)}, 70)

    sender.push(state, 71)
    prove(replica, base, 71)


def test_a_replica_that_never_joins_is_an_error_at_the_deadline(replica: Replica) -> None:
    class Absent:
        version = 0

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    started = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)time|connect|join"):
        Sender(replica).connect(timeout_s=3, client=Absent())
    assert time.monotonic() - started < 20
