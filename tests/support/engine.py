"""A real vLLM replica in this process, what sends it weights, and what it is compared with."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onlinerl.transports import _proof as proof
from onlinerl.types import Group, Prompt, Request, Sampling

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

State = dict[str, Tensor]
BUCKET = 20_000  # bytes: several messages per push, whose boundaries fall inside layers
TIMEOUT_S = 30.0
# fp32 on both sides; other kernels, other summation order.
CLOSE = 1e-4
# One block of the KV cache of the tiny model: 128 tokens, two layers, keys and values of two heads of 32 float32 numbers.
BLOCK_GIB = 128 * 2 * 2 * 2 * 32 * 4 / 2**30
# Too few for 16 sequences of 2 blocks each.
KV_BLOCKS = 24


class Watched:
    """A logger of vLLM's that keeps what the tests ask about."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.most_running = 0

    def __call__(self, vllm_config: Any, engine_index: int) -> Watched:
        return self

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *more: Any, **others: Any) -> None:
        if scheduler_stats is not None:
            self.most_running = max(self.most_running, scheduler_stats.num_running_reqs)
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...


class Replica:
    """A VLLMReplica on an asyncio loop of its own, called from this thread; also the client that a sender talks to."""

    def __init__(self, model: Path, worker: str | None = None, **engine: Any) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        from onlinerl.engines.vllm import VLLM, VLLMReplica
        from onlinerl.protocols.engine import ReplicaSettings
        from onlinerl.transports.gloo import Gloo

        self.version = 0
        """Of the push that is under way."""
        self.watched = Watched()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.config = VLLM(**{"dtype": "float32", "max_num_seqs": 16, "kv_cache_gib": KV_BLOCKS * BLOCK_GIB, **engine})
        usual = AsyncLLM.from_engine_args

        def watched(args: Any) -> AsyncLLM:
            args.worker_extension_cls = worker or args.worker_extension_cls
            return usual(args, stat_loggers=[self.watched])

        async def start() -> VLLMReplica:
            settings = ReplicaSettings(device="cpu", colocated=False, max_model_len=256, transport=Gloo(), seed=0)
            return VLLMReplica(str(model), self.config, settings)

        with mock.patch.object(AsyncLLM, "from_engine_args", watched):
            self.replica = self.wait(start(), 300)

    def wait(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def call(self, method: str, *args: Any) -> Any:
        return self.wait(getattr(self.replica, method)(*args))

    def close(self) -> None:
        self.wait(self.replica.shutdown())
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
        from onlinerl.transports.gloo.halves import GlooTrainerInitInfo, GlooTrainerWeightTransferEngine

        world_size = 1 + self._replica.config.tensor_parallel_size
        info = GlooTrainerInitInfo(
            rank=0, master_address="127.0.0.1", world_size=world_size, bucket_bytes=BUCKET, timeout_s=timeout_s
        )
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


def state_of(model: PreTrainedModel) -> State:
    from onlinerl.learners._weights import PolicySource

    return {name: tensor.clone() for name, tensor in PolicySource(model, torch.float32)}


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, with noise on every weight."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the response by transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
    table = torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]
    return table[torch.arange(len(response)), torch.tensor(response)].numpy()


rng = np.random.default_rng(0)
CANARY = [(tuple(map(int, rng.integers(4, 150, 6))), tuple(map(int, rng.integers(4, 150, 10)))) for _ in range(4)]
PROMPT = CANARY[0][0]


def canary(replica: Replica) -> list[np.ndarray]:
    return [replica.call("logprobs", prompt, response) for prompt, response in CANARY]


def prove(replica: Replica, model: PreTrainedModel, version: int, witness: str = "all") -> None:
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
