"""One real vLLM engine on CPU that is sent weights over gloo from this process, and the proofs that they arrived (R-A4, R-B1 to R-B5)."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from onlinerl.config import EngineConfig
from onlinerl.errors import SyncError
from onlinerl.sync import proof
from onlinerl.types import Group, Prompt, Request, Sampling

pytestmark = pytest.mark.engine

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

State = dict[str, Tensor]
BUCKET = 20_000  # bytes: several messages per push, whose boundaries fall inside layers
TIMEOUT_S = 30.0
# fp32 on both sides; other kernels, other summation order.
CLOSE = 1e-4


class Replica:
    """A VLLMReplica on an asyncio loop of its own, called from this thread; also the client that a sender talks to."""

    def __init__(self, model: Path) -> None:
        from onlinerl.engines.vllm import VLLMReplica

        self.version = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        config = EngineConfig(dtype="float32", max_concurrent=16, kv_cache_gib=0.1)

        async def start() -> VLLMReplica:
            return VLLMReplica(str(model), config, device="cpu", max_model_len=256, sync_backend="gloo", seed=0)

        self.replica = self.wait(start(), 300)

    def wait(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def call(self, method: str, *args: Any) -> Any:
        return self.wait(getattr(self.replica, method)(*args))

    def close(self) -> None:
        self.replica.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def sample(self, prompt: Sequence[int], seeds: Sequence[int], **sampling: Any) -> Group:
        request = Request(prompt=Prompt(id="p", text="", token_ids=tuple(prompt)), seeds=tuple(seeds))
        return self.call("generate", request, Sampling(**{"max_new_tokens": 12, **sampling}))

    # what `VLLMWeightSyncClient` asks for

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("finish_weight_update", weight_version or str(self.version))


def source_of(state: State, sent: State | None = None, fail_at: int | None = None) -> Any:
    """Declares `state`, yields `sent` (the same by default), and raises before tensor `fail_at`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in state.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for i, (name, tensor) in enumerate((sent or state).items()):
                if i == fail_at:
                    raise RuntimeError("the source broke")
                yield name, tensor

    return Source()


class Sender:
    """The learner's side: one connection, re-opened after a failure as `WeightPush` does."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._engine: Any = None

    def connect(self, timeout_s: float = TIMEOUT_S, client: Any = None) -> None:
        from onlinerl.sync.gloo import GlooTrainerInitInfo, GlooTrainerWeightTransferEngine

        info = GlooTrainerInitInfo(rank=0, master_address="127.0.0.1", world_size=2, bucket_bytes=BUCKET, timeout_s=timeout_s)
        self._engine = None
        self._engine = GlooTrainerWeightTransferEngine.trainer_init(info, client=client or self._replica, source=source_of({}))

    def push(self, state: State, version: int, *, reset: bool = True, **mutation: Any) -> None:
        """Send; what the engine is watched for is always everything."""
        if self._engine is None:
            self.connect()
        self._replica.call("watch", list(state))
        self._replica.version = version
        self._engine.source = source_of(state, **mutation)
        try:
            self._engine.send_weights()
        except BaseException:
            self._engine = None
            raise
        if reset:
            self._replica.call("reset_caches")


@pytest.fixture(scope="module")
def replica(tiny_llama: Path) -> Iterator[Replica]:
    replica = Replica(tiny_llama)
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def sender(replica: Replica) -> Sender:
    return Sender(replica)


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(tiny_llama: Path) -> LlamaForCausalLM:
    """Same shapes, other weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def state_of(model: LlamaForCausalLM) -> State:
    from onlinerl.learners._weights import PolicySource

    return {name: tensor.clone() for name, tensor in PolicySource(model, torch.float32)}


def plain(model: LlamaForCausalLM, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the response by transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
    table = torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]
    return table[torch.arange(len(response)), torch.tensor(response)].numpy()


def greedy(model: LlamaForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return tokens[len(prompt) :]


rng = np.random.default_rng(0)
CANARY = [(tuple(map(int, rng.integers(4, 150, 6))), tuple(map(int, rng.integers(4, 150, 10)))) for _ in range(4)]
PROMPT = CANARY[0][0]


def canary(replica: Replica) -> list[np.ndarray]:
    return [replica.call("score", prompt, response) for prompt, response in CANARY]


def prove(replica: Replica, model: LlamaForCausalLM, version: int, witness: str = "all") -> None:
    """The three witnesses of a push, as `WeightPush` calls them."""
    names = ["replica 0"]
    if witness in ("all", "version"):
        proof.check_version(version, [replica.call("weight_version")], names)
    if witness in ("all", "checksums"):
        sent = {name: proof.digest(tensor) for name, tensor in state_of(model).items()}
        proof.check_digests(sent, [replica.call("received")], names)
    if witness in ("all", "canary"):
        ours = [plain(model, prompt, response) for prompt, response in CANARY]
        proof.check_canary(ours, [canary(replica)], names, 0.05)


# --- sampling ---


def test_behaviour_logprobs_are_those_of_teacher_forcing(replica: Replica, sender: Sender, base: LlamaForCausalLM) -> None:
    sender.push(state_of(base), 1)

    rollout = replica.sample(PROMPT, [7]).rollouts[0]

    assert len(rollout.logprobs) == len(rollout.token_ids)
    np.testing.assert_allclose(rollout.logprobs, replica.call("score", PROMPT, rollout.token_ids), atol=CLOSE)
    np.testing.assert_allclose(rollout.logprobs, plain(base, PROMPT, rollout.token_ids), atol=CLOSE)
    assert rollout.policy_version == 1


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_behaviour_logprobs_are_at_the_sampling_temperature(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, temperature: float
) -> None:
    sender.push(state_of(base), 1)

    rollout = replica.sample(PROMPT, [3], temperature=temperature).rollouts[0]

    np.testing.assert_allclose(rollout.logprobs, plain(base, PROMPT, rollout.token_ids, temperature), atol=CLOSE)


def test_seeds_decide_what_is_sampled(replica: Replica) -> None:
    first = [r.token_ids for r in replica.sample(PROMPT, range(6)).rollouts]
    second = [r.token_ids for r in replica.sample(PROMPT, range(6)).rollouts]

    assert first == second
    assert len(set(first)) == 6


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


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.self_attn", "layers.1.mlp", "norm"])
def test_every_part_of_the_model_follows(
    replica: Replica, sender: Sender, base: LlamaForCausalLM, other: LlamaForCausalLM, part: str
) -> None:
    """On CPU the engine computes with packed copies of its matrices, tied embeddings included (R-B7): all must be made anew."""
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
    """With prefix caching, a repeated prompt must not be answered from the cache of older weights (R-B1)."""
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


# --- pushes that do not (R-B2) ---


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
